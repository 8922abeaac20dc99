r"""Tokenises a corpus too large for one machine, on Apache Beam, for training to find.

    pip install -e '.[beam]'
    python main.py --config=configs/corpus.py --config.data.path='~/texts/*.jsonl'

    # then train on it: the same data, with the tokenizer that is now in runs/corpus
    python main.py --config=configs/quickstart.py --config.data.path='~/texts/*.jsonl' \
        --config.data.validation_fraction=0.05 --config.tokenizer.path=runs/corpus/tokenizer

    # another tokenizer; fewer processes here
    ... --config.tokenizer.path=tokenizer.json
    ... --config.beam.workers=4

    # on Google Cloud Dataflow, in a bucket (pip install 'apache-beam[gcp]' gcsfs)
    docker build --file=launch/Dockerfile --tag=IMAGE --build-arg=EXTRAS=beam,data \
        --build-arg=BASE=apache/beam_python3.12_sdk:2.77.0 . && docker push IMAGE
    python main.py --config=configs/corpus.py --config.data.path='gs://BUCKET/texts/*.jsonl' \
        --config.data.cache_dir=gs://BUCKET/tokens --config.beam.runner=DataflowRunner \
        --config.beam.options='--project=P --region=us-east5 --temp_location=gs://BUCKET/tmp
            --sdk_container_image=IMAGE'

    # and train with the bucket mounted, or its `tokens` copied to a disk
    python main.py ... --config.data.path='gs://BUCKET/texts/*.jsonl' \
        --config.data.cache_dir=/mnt/lm/tokens

Any runner will do (`--config.beam.runner=FlinkRunner`, …) if all its workers see the files and
`data.cache_dir` under the same path. The files of tokens are, byte for byte, those that one process
writes, so training cannot tell; a job that was interrupted goes on when it is started again. Lines
of .jsonl, .ndjson and .tsv files and row groups of Parquet files are shared out, 64 MB at a time;
another file is one worker's.

As it stands, two CPU cores that had much else to do made and tokenised 50,000 stories (23 MB) in 48
seconds, after training the tokenizer: 22 seconds of CPU time in all. 48 MB of JSON Lines took 31
seconds of CPU time on two processes, and 24 in the one process of a training run.
"""

from lm import config
from lm.jobs.corpus import CorpusJob


def get_config():
    c = config.defaults(CorpusJob)
    c.data.path = "storyworld"
    c.data.num_documents = 50_000
    c.tokenizer.vocab_size = 1024
    c.beam.part_bytes = 64 << 20
    return c
