"""The sections of accelerator.py: each in a process of its own, and what they found as text."""

import contextlib
import math
import multiprocessing
import sys
import time
import traceback


class Run:
    """One section's view: what was found before it, and where its own results go."""

    def __init__(self, tiny, found, send):
        self.tiny, self.found, self.send = tiny, found, send

    def check(self, name, value, limit):
        """Records whether `value` is at most `limit`; NaN is not."""
        passed, value = bool(value <= limit), float(value)
        self.send("checks", dict(name=name, value=known(value), limit=limit, passed=passed))

    @contextlib.contextmanager
    def guarded(self, name):
        """What goes wrong within it is a check that failed, and what follows is still done."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            name = f"{name} ({reason(error)})"
            self.send("checks", dict(name=name, value=None, limit=None, passed=False))

    def figure(self, name, **values):
        """Records what was measured; NaN, of what an earlier section did not find, as null."""
        self.send("figures", {"name": name, **{key: known(x) for key, x in values.items()}})

    def note(self, text):
        """Records a sentence."""
        self.send("notes", text)

    def of(self, name):
        """An earlier figure; empty where its section failed or was left out."""
        return next((f for f in self.found["figures"] if f["name"] == name), {})


def known(value):
    """`value`, or None for a NaN or an infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reason(error):
    """An exception in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def work(function, tiny, found, pipe):
    """A section, in its process: every result goes to the parent as soon as it is there."""
    try:
        function(Run(tiny, found, lambda kind, value: pipe.send((kind, value))))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("failures", reason(error)))
    pipe.close()


def run_section(name, function, tiny, found, deadline):
    """Adds what a section finds to `found`."""
    processes = multiprocessing.get_context("fork")  # what was imported need not be again
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=work, args=(function, tiny, found, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0)):
            kind, value = receiver.recv()
            add(found, kind, f"{name}: {value}" if kind == "failures" else value)
        add(found, "notes", f"{name}: stopped, as the budget was used up")
        process.kill()
    except EOFError:
        process.join()
        if process.exitcode:
            add(found, "failures", f"{name}: its process ended with exit code {process.exitcode}")
    process.join()


def add(found, kind, value):
    """Keeps a result, and prints it."""
    found[kind].append(value)
    if kind == "checks":
        verdict = "pass" if value["passed"] else "FAIL"
        numbers = [math.nan if x is None else x for x in (value["value"], value["limit"])]
        print("{}  {}: {:.2e} (limit {:.2e})".format(verdict, value["name"], *numbers))
    elif kind == "figures":
        print(f"      {value['name']}: {line(value)}")
    else:
        print(f"{kind.removesuffix('s'):5s} {value}")
    sys.stdout.flush()


def line(figure):
    """A figure's values in words."""
    shares = ("mfu", "mfu_published", "prefill_mfu", "of_bandwidth")
    parts = []
    for name, value in figure.items():
        if name != "name":
            if isinstance(value, float):
                value = f"{value:.1%}" if name in shares else f"{value:,.4g}"
            parts.append(f"{name} {value}")
    return "  ".join(parts)


def table(found):
    """What to paste: one line a figure."""
    rows = [("", "tokens/s", "MFU", "of bandwidth", "GB", "batch")]
    for figure in found["figures"]:
        rate = figure.get("tokens_per_second", figure.get("decode_tokens_per_second"))
        if rate is not None:
            rows.append(
                (
                    figure["name"],
                    f"{rate:,.0f}",
                    f"{figure['mfu']:.1%}" if figure.get("mfu") else "",
                    f"{figure['of_bandwidth']:.1%}" if figure.get("of_bandwidth") else "",
                    f"{figure['memory_gb']:.1f}" if figure.get("memory_gb") else "",
                    f"{figure['batch']}×{figure['length']}" if "batch" in figure else "",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *rest in rows:
        cells = "  ".join(cell.rjust(width) for cell, width in zip(rest, widths[1:]))
        print(name.ljust(widths[0]) + "  " + cells)
