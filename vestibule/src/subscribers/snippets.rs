//! What a team needs to take its events from the stream: ready to paste.

use std::{fmt, path::Path};

/// How one subscriber is used from three clients.
pub(super) struct Snippets<'a> {
    pub(super) name: &'a str,
    pub(super) url: &'a str,
    pub(super) stream: &'a str,
    pub(super) password: &'a Path,
}

impl fmt::Display for Snippets<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, url, stream, password } = self;
        let password = password.display();
        write!(
            f,
            r#"Python (nats-py):

    import asyncio, json, nats

    async def main():
        password = open("{password}").read().strip()
        connection = await nats.connect(
            "{url}", user="{name}", password=password, inbox_prefix=b"_INBOX_{name}")
        events = await connection.jetstream().pull_subscribe_bind("{name}", stream="{stream}")
        while True:
            try:
                messages = await events.fetch(16, timeout=30)
            except nats.errors.TimeoutError:
                continue
            for message in messages:
                event = json.loads(message.data)
                print(event["id"], event["type"])  # do it once for each id
                await message.ack_sync()

    asyncio.run(main())

JavaScript (@nats-io/transport-node, @nats-io/jetstream):

    import {{ readFileSync }} from "node:fs";
    import {{ connect }} from "@nats-io/transport-node";
    import {{ jetstream }} from "@nats-io/jetstream";

    const pass = readFileSync("{password}", "utf8").trim();
    const connection = await connect(
      {{ servers: "{url}", user: "{name}", pass, inboxPrefix: "_INBOX_{name}" }});
    const consumer = await jetstream(connection).consumers.get("{stream}", "{name}");
    for await (const message of await consumer.consume()) {{
      const event = message.json();
      console.log(event.id, event.type); // do it once for each id
      message.ack();
    }}

The command line (nats):

    nats --server {url} --user {name} --password "$(cat {password})" \
      --inbox-prefix _INBOX_{name} consumer next {stream} {name} --ack"#
        )
    }
}
