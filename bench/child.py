"""A contender in a process of its own, which answers one line of JSON for another; and what it says of its memory.

Imports nothing but the standard library, so that a peer's process is as the peer is installed. What a contender prints goes to
stderr; only the answers go to the pipe.
"""

import json
import os
import subprocess
import sys
import time

CLOCKS = ("wall", "cpu")
SETTLE = 0.02  # seconds until the threads of the one who asked no longer spin


class Child:
    """ask(**request) → the answer of ``python file arguments``, a dict. Errors: RuntimeError when it has ended."""

    def __init__(self, *command, python=sys.executable):
        self.command = [python, *map(str, command)]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what follows tells
        return self.hear()

    def hear(self):
        """What it says unasked."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command[1:])} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Watch:
    """read() → milliseconds since it was made, of the wall and of this process on all its cores."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self):
        return {"wall": 1e3 * (time.perf_counter() - self.wall), "cpu": 1e3 * (time.process_time() - self.cpu)}


class Line:
    """The other end: receive() → the next request, or None after the last; send(answer)."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self):
        line = sys.stdin.readline()
        time.sleep(SETTLE)
        return json.loads(line) if line else None

    def send(self, **answer):
        self.out.write(json.dumps(answer) + "\n")
        self.out.flush()


def serve(answer):
    """Answers every request with answer(**request)."""
    line = Line()
    while (request := line.receive()) is not None:
        line.send(**answer(**request))


class Pace:
    """A loop that runs one step for each request: ``turn`` is called where a step ends and the next begins."""

    def __init__(self):
        self.line, self.watch = Line(), None

    def turn(self):
        """Answers with what the step took, then waits. Raises SystemExit after the last request."""
        if self.watch is not None:
            self.line.send(**self.watch.read(), peak_MiB=resident("VmHWM"))
        if self.line.receive() is None:
            raise SystemExit
        self.watch = Watch()


def resident(field):
    """MiB of this process's memory: VmRSS now, VmHWM at most since the start or ``reset_peak``."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
