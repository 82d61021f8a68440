#!/usr/bin/env python3
"""A stand-in for an identity verification service, to try the example with.

    ./service.py [--port 8099] [--delay SECONDS]

POST /verify with {"name": ..., "birth_date": ...} answers {"verified": true, "score": 87}, or 404 for somebody
it has never heard of. It listens on this machine only. Python alone is enough to run it.
"""

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "try-me"

# Who it knows: the birth date, and how sure it is that the document is theirs.
PEOPLE = {
    "ada lovelace": ("1815-12-10", 87),
    "charles babbage": ("1791-12-26", 55),
}
SURE_ENOUGH = 60


class Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as with the real ones
    delay = 0.0

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        time.sleep(self.delay)
        if self.headers.get("x-api-key") != KEY:
            return self.answer(401, {"error": "unknown key"})
        if self.path != "/verify":
            return self.answer(404, {"error": "no such thing"})
        try:
            asked = json.loads(body)
            name, birth_date = asked["name"].lower(), asked["birth_date"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return self.answer(400, {"error": "expected name and birth_date"})
        if name not in PEOPLE:
            return self.answer(404, {"error": "unknown person"})
        expected, score = PEOPLE[name]
        if birth_date != expected:
            score = 0
        return self.answer(200, {"verified": score >= SURE_ENOUGH, "score": score})

    def answer(self, status, what):
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Says nothing: requests are about people."""


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--port", type=int, default=8099, help="0 for any that is free")
    arguments.add_argument("--delay", type=float, default=0.0, help="seconds before every answer, to see what is done without one")
    arguments = arguments.parse_args()
    Service.delay = arguments.delay
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Service)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
