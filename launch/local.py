"""Several processes of one run on this machine, connected as the hosts of a cluster would be.

    python launch/local.py --processes=4 --devices=2 -- --config=configs/quickstart.py \
        --config.mesh.fsdp=2

What follows `--` goes to main.py. Every line of output gets the number of its process in front.
`--devices` gives each process so many fake CPU devices; without it the processes share the
machine's GPUs evenly, or each has its CPU.

If a process dies, the others have `--grace` seconds to say so and leave by themselves before they
are killed. `--restarts` starts all again, at the last checkpoint, unless the command itself was
wrong.
SIGTERM and Ctrl-C are passed on, so that the run saves and ends; a second one kills it.

Over several machines or network namespaces, each launcher starts some of the processes, and
`--address` is where process 0 listens:

    host A:  python launch/local.py --processes=2 --total=4 --address=10.0.0.1:8476 -- …
    host B:  python launch/local.py --processes=2 --total=4 --address=10.0.0.1:8476 --first=2 -- …

`--via` starts each process by another command, `{process}` being its number, as in
`--via='ip netns exec host{process}'`. `--dry-run` prints the commands and starts nothing.

Exit codes: 0 when all processes end well; else that of the first that did not, 128 + n if signal n
killed it. 75 (try again) is what a process gives when another one died.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
MISTAKE = 2  # main.py's exit code for what the user must mend: starting again would not help


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(
        prog="launch/local.py", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--processes", type=int, default=2, help="how many to start here")
    add("--devices", type=int, default=0, help="fake CPU devices of each; 0: real ones")
    add("--total", type=int, default=0, help="processes of the whole run; those here by default")
    add("--first", type=int, default=0, help="number of the first process here")
    add("--address", default="", help="host:port of process 0; a free port here by default")
    add("--via", default="", help="command that starts another; {process} is its number")
    add("--program", default="main.py", help="what to run, relative to the repository")
    add("--restarts", type=int, default=0, help="times to start again when a process dies")
    add("--grace", type=float, default=60, help="seconds the others have to leave")
    add("--dry-run", action="store_true", help="print the commands and start nothing")
    add("arguments", nargs="*", help="after --: flags of the program")
    flags = parser.parse_args(argv)
    flags.total = flags.total or flags.first + flags.processes
    host, _, port = flags.address.rpartition(":")
    if flags.processes < 1:
        parser.error(f"--processes={flags.processes} must be at least 1")
    if flags.devices < 0 or flags.restarts < 0 or flags.grace < 0:
        parser.error("--devices, --restarts and --grace must not be negative")
    if not 0 <= flags.first <= flags.total - flags.processes:
        parser.error(
            f"processes {flags.first} to {flags.first + flags.processes - 1} are not among the "
            f"--total={flags.total}"
        )
    if flags.address and not (host and port.isdecimal() and 0 < int(port) < 65536):
        parser.error(f"--address={flags.address} must be host:port")
    if flags.total > flags.processes and not flags.address:
        parser.error(f"--total={flags.total} needs --address, where all can reach process 0")
    return flags


def free_port() -> int:
    """A TCP port nobody uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def gpus(environment: dict[str, str]) -> list[str]:
    """The GPUs this process may use."""
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return [name for name in shown.split(",") if name]
    found = pathlib.Path("/dev").glob("nvidia[0-9]*")
    return sorted((path.name.removeprefix("nvidia") for path in found), key=int)


def plan(
    flags: argparse.Namespace, address: str, environment: dict[str, str]
) -> list[tuple[int, dict[str, str], list[str]]]:
    """Number, variables to set and command of every process here."""
    here = gpus(environment) if not flags.devices else []
    share = len(here) // flags.processes
    planned = []
    for place in range(flags.processes):
        process = flags.first + place
        variables = {
            "LM_COORDINATOR": address,
            "LM_PROCESS_ID": str(process),
            "LM_NUM_PROCESSES": str(flags.total),
            "PYTHONUNBUFFERED": "1",
        }
        if flags.devices:
            # The older flag for fake devices would be a second opinion on their number.
            kept = [
                flag
                for flag in environment.get("XLA_FLAGS", "").split()
                if "xla_force_host_platform_device_count" not in flag
            ]
            variables |= {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(flags.devices),
                "XLA_FLAGS": " ".join(kept),
            }
        elif share and flags.processes > 1:
            mine = here[place * share : (place + 1) * share]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        command = [sys.executable, str(REPOSITORY / flags.program), *flags.arguments]
        if flags.via:
            # What lies between may pass no environment on.
            settings = [f"{name}={value}" for name, value in variables.items()]
            via = shlex.split(flags.via.replace("{process}", str(process)))
            command = [*via, "env", *settings, *command]
        planned.append((process, variables, command))
    return planned


class Group:
    """The processes of one attempt."""

    def __init__(self, planned: list[tuple[int, dict[str, str], list[str]]]):
        self.children: dict[int, subprocess.Popen[str]] = {}
        self.readers = []
        for process, variables, command in planned:
            child = subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C comes to us alone, and is passed on once
            )
            self.children[process] = child
            reader = threading.Thread(target=self._repeat, args=(process, child), daemon=True)
            reader.start()
            self.readers.append(reader)

    @staticmethod
    def _repeat(process: int, child: subprocess.Popen[str]) -> None:
        for line in child.stdout:
            sys.stdout.write(f"[{process}] {line.rstrip()}\n")
            sys.stdout.flush()

    def signal(self, number: int) -> None:
        """Sends a signal to every process that still runs."""
        for child in self.children.values():
            if child.poll() is None:
                child.send_signal(number)

    def wait(self, grace: float, interrupted: list[int]) -> dict[int, int]:
        """Exit codes, in the order in which the processes ended.

        Args:
          grace: seconds the others have once one has failed.
          interrupted: filled by signals to the launcher: passed on, and killing at the second.
        """
        codes: dict[int, int] = {}
        passed = 0
        deadline = None
        while len(codes) < len(self.children):
            for process, child in self.children.items():
                if process not in codes and child.poll() is not None:
                    codes[process] = child.returncode
                    if child.returncode:
                        say(f"process {process} ended with {meaning(child.returncode)}")
                        deadline = deadline or time.monotonic() + grace
            if len(interrupted) > passed:
                passed = len(interrupted)
                self.signal(signal.SIGTERM if passed == 1 else signal.SIGKILL)
            if deadline and time.monotonic() > deadline:
                left = [str(p) for p in self.children if p not in codes]
                say(f"killing {', '.join(left)}: still there {grace:g} s after the first failure")
                self.signal(signal.SIGKILL)
                deadline = time.monotonic() + 3600
            time.sleep(0.05)
        for reader in self.readers:
            reader.join(5)
        return codes


def meaning(code: int) -> str:
    """An exit code in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"


def say(text: str) -> None:
    """A line of the launcher's own."""
    print(f"[launch] {text}", flush=True)


def main(argv: list[str]) -> int:
    """Starts the processes, again if need be; the exit code."""
    flags = parse(argv)
    interrupted: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: interrupted.append(number))
    for attempt in range(flags.restarts + 1):
        planned = plan(flags, flags.address or f"127.0.0.1:{free_port()}", dict(os.environ))
        if flags.dry_run:
            for _, variables, command in planned:
                if not flags.via:
                    command = [*(f"{name}={value}" for name, value in variables.items()), *command]
                print(shlex.join(command))
            return 0
        codes = Group(planned).wait(flags.grace, interrupted)
        failed = [code for code in codes.values() if code]
        if not failed:
            return 0
        if interrupted or MISTAKE in failed:
            break
        if attempt < flags.restarts:
            say(f"starting all again ({attempt + 1} of {flags.restarts})")
    return failed[0] if failed[0] > 0 else 128 - failed[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
