"""A SCIM 2.0 server on a port of its own, told what to do by lines on standard input.

    {"plan": {"method": "PATCH", "status": 503, "headers": {"Retry-After": "1"}}}
        answers the next call of that method so; with "act": true, only after it has happened
    {"do": 7, "method": "GET", "path": "/Groups/…", "body": …}
        makes a call itself and prints {"done": 7, "status": 200, "body": …}

Every other call is printed as {"call": "PATCH /Groups/…", "status": 200}. The server ends when standard
input does.
"""

import collections
import io
import json
import sys
import threading
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.util import setup_testing_defaults

from scim2_models import ScimProvider
from scim2_server.memory import InMemoryStorage
from scim2_server.service import ScimService
from scim2_server.testserver.application import BearerTokenApplication
from scim2_server.testserver.cli import ThreadingWSGIServer
from scim2_server.utils import (
    load_default_resource_types,
    load_default_schemas,
    load_default_service_provider_config,
)

planned = collections.defaultdict(collections.deque)
printing = threading.Lock()


def tell(**fact):
    with printing:
        print(json.dumps(fact), flush=True)


def scim(token):
    provider = ScimProvider.from_discovery(
        load_default_schemas().values(),
        load_default_resource_types().values(),
        config=load_default_service_provider_config(),
    )
    service = ScimService(provider, secret="a test's")
    return BearerTokenApplication(
        InMemoryStorage(), provider, service=service, bearer_tokens=[token]
    )


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


def watched(application):
    def call(environ, start_response):
        method = environ["REQUEST_METHOD"]
        what = f"{method} {environ['PATH_INFO'].removeprefix('/v2')}"
        plan = planned[method].popleft() if planned[method] else None
        if plan is None:

            def start(status, headers):
                tell(call=what, status=int(status.split()[0]))
                return start_response(status, headers)

            return application(environ, start)
        if plan.get("act"):
            list(application(environ, lambda *_: None))
        tell(call=what, status=plan["status"])
        start_response(f"{plan['status']} Planned", list(plan.get("headers", {}).items()))
        return [b""]

    return call


def make_call(application, token, method, path, body):
    content = b"" if body is None else json.dumps(body).encode()
    path, _, query = path.partition("?")
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": f"/v2{path}",
        "QUERY_STRING": query,
        "CONTENT_TYPE": "application/scim+json",
        "CONTENT_LENGTH": str(len(content)),
        "HTTP_AUTHORIZATION": f"Bearer {token}",
        "wsgi.input": io.BytesIO(content),
    }
    setup_testing_defaults(environ)
    answer = {}

    def start(status, _headers):
        answer["status"] = int(status.split()[0])

    text = b"".join(application(environ, start))
    answer["body"] = json.loads(text) if text else None
    return answer


def main():
    token = sys.argv[1]
    application = scim(token)
    with make_server(
        "127.0.0.1",
        0,
        watched(application),
        server_class=ThreadingWSGIServer,
        handler_class=Quiet,
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tell(port=server.server_port)
        for line in sys.stdin:
            order = json.loads(line)
            if "plan" in order:
                planned[order["plan"]["method"]].append(order["plan"])
                tell(planned=True)
            else:
                answer = make_call(
                    application, token, order["method"], order["path"], order.get("body")
                )
                tell(done=order["do"], **answer)
        server.shutdown()


main()
