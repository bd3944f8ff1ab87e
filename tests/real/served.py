"""A `conclave serve` as a child process, asked over HTTP."""

import json
import subprocess
import threading
import urllib.request

START_MAX_S = 180
ANSWER_MAX_S = 300


class Served:
    """Started with `with`; `plan` holds the lines of the plan that it printed."""

    def __init__(self, program, model, flags, log):
        command = [str(program), "serve", str(model), "--listen", "127.0.0.1:0", "--kv-cache-memory", "128MiB", *flags]
        self.log = open(log, "w", encoding="utf-8")
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.address, self.plan = None, []

    def __enter__(self):
        watchdog = threading.Timer(START_MAX_S, self.child.kill)
        watchdog.start()
        for line in self.child.stdout:
            if line.startswith("serving on "):
                self.address = line.split()[2]
                break
            self.plan.append(line.rstrip())
        watchdog.cancel()
        if self.address is None:
            raise RuntimeError(f"the server did not become ready, see {self.log.name}")
        return self

    def __exit__(self, kind, error, trace):
        self.child.terminate()
        try:
            code = self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            code = self.child.wait()
        self.log.close()
        if kind is None and code != 0:
            raise RuntimeError(f"the server ended with {code}, see {self.log.name}")

    def mesh(self):
        """`pp1 x dp3 x tp1, ep1`, as the plan's first line states it."""
        line = next(line for line in self.plan if " x dp" in line)
        return line.split(": ", 1)[1].split(" on ")[0]

    def open(self, path, body):
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(),
                                         {"content-type": "application/json"})
        return urllib.request.urlopen(request, timeout=ANSWER_MAX_S)

    def ask(self, path, **body):
        with self.open(path, body) as answer:
            return json.load(answer)

    def stream(self, **body):
        """The pieces of a streamed chat, and why it ended."""
        pieces, reason = [], None
        with self.open("/v1/chat/completions", body | {"stream": True}) as answer:
            for line in answer:
                line = line.decode().strip()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                for choice in json.loads(line[6:])["choices"]:
                    pieces.append(choice["delta"].get("content") or "")
                    reason = choice["finish_reason"] or reason
        return pieces, reason
