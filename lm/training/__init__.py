"""Training: a loss, an optimizer and data become updated parameters.

    config.py       the sections `train` and `optimizer`
    workload.py     what is trained, in one value; whether the devices can share it
    schedules.py    the learning rate of a step
    optimizer.py    gradients → updates
    step.py         one optimizer step, as a function of arrays
    offload.py      the same with the optimizer's state in the host's memory
    setup.py        a workload → its state's shapes and shardings, and the jitted step
    loop.py         dispatches, records, evaluations, checkpoints, to the last step
    evaluate.py     the loss on all validation data
    checkpoints.py  the series of a run; checkpoint_files.py: the files of one
    metrics.py      what was measured, on disk; progress.py: in a terminal; plots.py: as a picture
    report.py       what a run is about to do; memory.py and model_facts.py: what it takes

`lm.jobs.train` puts them together.
"""
