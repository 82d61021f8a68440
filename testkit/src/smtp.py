"""An SMTP server that records: every accepted message is one JSON line on standard output.

Standard input takes JSON lines {"stage": "rcpt" | "data", "reply": "451 4.7.1 later"}: each is given once, in
order, instead of the next acceptance at that stage. The server ends when standard input does.
"""

import asyncio
import collections
import json
import sys

from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

planned = {"rcpt": collections.deque(), "data": collections.deque()}


def tell(**fact):
    print(json.dumps(fact), flush=True)


class Recorder:
    async def handle_RCPT(self, server, session, envelope, address, options):
        if planned["rcpt"]:
            return planned["rcpt"].popleft()
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 fine"

    async def handle_DATA(self, server, session, envelope):
        if planned["data"]:
            return planned["data"].popleft()
        tell(
            mail_from=envelope.mail_from,
            recipients=envelope.rcpt_tos,
            login=getattr(session, "login", None),
            content=envelope.original_content.decode("utf-8", "replace"),
        )
        return "250 2.0.0 taken"


def authenticator(user, password):
    def check(server, session, envelope, mechanism, data):
        right = (
            isinstance(data, LoginPassword)
            and data.login.decode() == user
            and data.password.decode() == password
        )
        if right:
            session.login = user
        return AuthResult(success=right, handled=False)

    return check


async def main():
    options = {"hostname": "mail.test"}
    if len(sys.argv) == 3:
        options |= {
            "authenticator": authenticator(sys.argv[1], sys.argv[2]),
            "auth_required": True,
            "auth_require_tls": False,
        }
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(Recorder(), **options), "127.0.0.1", 0)
    tell(port=server.sockets[0].getsockname()[1])

    while line := await loop.run_in_executor(None, sys.stdin.readline):
        plan = json.loads(line)
        planned[plan["stage"]].append(plan["reply"])
        tell(planned=plan["reply"])


asyncio.run(main())
