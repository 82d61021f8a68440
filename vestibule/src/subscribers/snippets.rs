//! What a team needs to take its events from the stream: ready to paste.

use std::{fmt, path::Path};

use serde_json::json;

/// How one subscriber is used from three clients.
pub(super) struct Snippets<'a> {
    pub(super) name: &'a str,
    pub(super) url: &'a str,
    pub(super) stream: &'a str,
    pub(super) password: &'a Path,
}

impl fmt::Display for Snippets<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, .. } = self;
        // Texts of JSON are texts of Python and of JavaScript, too.
        let text = |it: &str| json!(it).to_string();
        let password = self.password.to_string_lossy();
        let word = |it: &str| format!("'{}'", it.replace('\'', r"'\''"));
        let (for_url, for_stream, for_password) =
            (word(self.url), word(self.stream), word(&password));
        let (url, stream, password) = (text(self.url), text(self.stream), text(&password));
        write!(
            f,
            r#"Python (nats-py):

    import asyncio, json, nats

    async def main():
        password = open({password}).read().strip()
        connection = await nats.connect(
            {url}, user="{name}", password=password, inbox_prefix=b"_INBOX_{name}")
        events = await connection.jetstream().pull_subscribe_bind("{name}", stream={stream})
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

    const pass = readFileSync({password}, "utf8").trim();
    const connection = await connect(
      {{ servers: {url}, user: "{name}", pass, inboxPrefix: "_INBOX_{name}" }});
    const consumer = await jetstream(connection).consumers.get({stream}, "{name}");
    for await (const message of await consumer.consume()) {{
      const event = message.json();
      console.log(event.id, event.type); // do it once for each id
      message.ack();
    }}

The command line (nats):

    nats --server {for_url} --user {name} --password "$(cat {for_password})" \
      --inbox-prefix _INBOX_{name} consumer next {for_stream} {name} --ack"#
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_path_is_called_it_stays_one_text() {
        let password = Path::new(r#"it's "so"/crm.password"#);
        let snippets =
            Snippets { name: "crm", url: "nats://127.0.0.1:4222", stream: "SIGNUPS", password };
        let printed = snippets.to_string();
        for part in [
            r#"open("it's \"so\"/crm.password").read()"#,
            r#"readFileSync("it's \"so\"/crm.password", "utf8")"#,
            r#"$(cat 'it'\''s "so"/crm.password')"#,
            r#""nats://127.0.0.1:4222", user="crm""#,
            "consumer next 'SIGNUPS' crm",
        ] {
            assert!(printed.contains(part), "{part} is not in {printed}");
        }
    }
}
