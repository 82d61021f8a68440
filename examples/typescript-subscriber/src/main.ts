/**
 * A subscriber to sign-ups: hands each event to an HTTP service.
 *
 * Takes events from a durable consumer of NATS JetStream, one at a time, and has each of them take effect once,
 * whatever is killed when:
 *
 * - An event is acknowledged after its effect, so it may come again. Its id goes with the request as
 *   `Idempotency-Key`: the service does what it has done before only once. (With a database of your own, write the
 *   id in the same transaction as the effect instead, as the example in Python does.)
 * - What fails for now is tried again later, and later each time. What fails for good, or too often, is parked:
 *   written to a file and taken out of the consumer. Nothing disappears.
 * - While an event is worked on, the server is told so; it would give the event to somebody else otherwise.
 *
 * To make it yours, change `takeEffect`. To go faster, run it several times: the copies share the consumer.
 */

import { open } from "node:fs/promises";

import { jetstream, type JsMsg } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";

/** An event that failed so often is parked. */
const TRIES_MAX = 20;
/** The first pause after a failure, doubled each time, and the longest. */
const PAUSE_FIRST_MS = 1_000;
const PAUSE_LONGEST_MS = 300_000;
/** So long one request for an event stands at the server. A stop takes as long at most. */
const PATIENCE_MS = 2_000;
/** So long the service may take for one event. */
const TIMEOUT_MS = 20_000;

/** As much of an event as this subscriber needs; the JSON Schema is `/schemas/signup-event.v1.json`. */
interface SignUpEvent {
  specversion: "1.0";
  id: string;
  type: string;
  /** The pseudonym of the person. */
  subject: string;
  dataschema: string;
  data: { connector: string; email?: string; claims?: Record<string, unknown> };
}

/** The same event may go through later. */
class ForNow extends Error {
  constructor(
    message: string,
    readonly notBeforeMs = 0,
  ) {
    super(message);
  }
}

/** No number of tries will help. */
class ForGood extends Error {}

/** What this subscriber is for. */
async function takeEffect(event: SignUpEvent, url: string): Promise<void> {
  let answer: Response;
  try {
    answer = await fetch(url, {
      method: "POST",
      headers: { "content-type": "application/cloudevents+json", "idempotency-key": event.id },
      body: JSON.stringify(event),
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    await answer.arrayBuffer();
  } catch {
    throw new ForNow("the service does not answer");
  }
  if (answer.ok) return;
  const said = `the service answered ${answer.status}`;
  if (answer.status === 408 || answer.status === 429 || answer.status >= 500) {
    const seconds = Number(answer.headers.get("retry-after") ?? 0);
    throw new ForNow(said, Number.isFinite(seconds) ? seconds * 1_000 : 0);
  }
  throw new ForGood(said);
}

/** Takes what it knows and ignores what it does not: events of version 1 only ever gain members and kinds. */
function read(body: string): SignUpEvent {
  let event: Partial<SignUpEvent> | null;
  try {
    event = JSON.parse(body);
  } catch {
    throw new ForGood("not an event: no JSON");
  }
  const texts = [event?.id, event?.type, event?.subject, event?.dataschema];
  if (event?.specversion !== "1.0" || texts.some((it) => typeof it !== "string") || typeof event.data !== "object") {
    throw new ForGood("not an event: something is missing");
  }
  const version = event.dataschema?.split(":").at(-1);
  if (version !== "1") throw new ForGood(`an event of version ${version}, and this subscriber knows version 1`);
  return event as SignUpEvent;
}

/** Durable before the event leaves the consumer. The file holds personal data, as events do. */
async function park(message: JsMsg, why: string, path: string): Promise<void> {
  const letter = { sequence: message.seq, subject: message.subject, why, event: message.string() };
  const file = await open(path, "a", 0o600);
  try {
    await file.write(JSON.stringify(letter) + "\n");
    await file.sync();
  } finally {
    await file.close();
  }
}

/** Chance, from 0 to 1, keeps what failed together from coming back together. */
function pauseAfter(tries: number, chance: number): number {
  return Math.min(PAUSE_FIRST_MS * 2 ** (tries - 1), PAUSE_LONGEST_MS) * (0.5 + chance / 2);
}

async function dealWith(message: JsMsg, url: string, parked: string, ackWaitMs: number): Promise<void> {
  const heartbeat = setInterval(() => message.working(), ackWaitMs / 3);
  try {
    const event = read(message.string());
    await takeEffect(event, url);
    message.ack();
    log(`handled ${event.type.split(".").at(-1)} ${event.id} of ${event.subject}`);
  } catch (error) {
    // What other errors say may quote the event, which is personal data.
    const known = error instanceof ForNow || error instanceof ForGood;
    const why = known ? error.message : "a mistake in this program";
    if (error instanceof ForNow && message.info.deliveryCount < TRIES_MAX) {
      const longest = Math.min(error.notBeforeMs, PAUSE_LONGEST_MS);
      const pause = Math.max(pauseAfter(message.info.deliveryCount, Math.random()), longest);
      log(`event ${message.seq} failed for now (${why}): again in ${(pause / 1_000).toFixed(1)} s`);
      message.nak(Math.round(pause));
    } else {
      await park(message, why, parked);
      log(`event ${message.seq} was parked: ${why}`);
      message.term();
    }
  } finally {
    clearInterval(heartbeat);
  }
}

function setting(name: string, otherwise?: string): string {
  const value = process.env[name] ?? otherwise;
  if (value === undefined) throw new Error(`the environment has no ${name}`);
  return value;
}

function log(text: string): void {
  console.log(`${new Date().toISOString()} ${text}`);
}

async function main(): Promise<void> {
  const stream = setting("STREAM", "SIGNUPS");
  const consumerName = setting("CONSUMER");
  const url = setting("TARGET_URL");
  const parked = setting("PARKED", "parked.jsonl");

  let stopping = false;
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => (stopping = true));

  const connection = await connect({
    servers: setting("NATS_URL", "nats://127.0.0.1:4222").split(","),
    name: consumerName,
    user: setting("NATS_USER", consumerName),
    pass: setting("NATS_PASSWORD"),
    // Whoever may listen to an inbox reads what comes to it, so each user has a prefix of its own.
    inboxPrefix: setting("INBOX_PREFIX", `_INBOX_${consumerName}`),
    maxReconnectAttempts: -1,
    waitOnFirstConnect: true,
    pingInterval: 5_000,
  });
  void (async () => {
    for await (const { type } of connection.status()) {
      if (type === "disconnect" || type === "reconnect") log(`NATS: ${type}`);
    }
  })();

  // The consumer exists: an operator made it, and this user may not change it.
  const consumer = await jetstream(connection).consumers.get(stream, consumerName);
  const ackWaitMs = ((await consumer.info(true)).config.ack_wait ?? 30e9) / 1e6;
  log(`taking events of ${consumerName} from ${stream}`);
  while (!stopping) {
    let message: JsMsg | null;
    try {
      message = await consumer.next({ expires: PATIENCE_MS });
    } catch (error) {
      if (connection.isClosed()) throw new Error("the connection is closed for good");
      log(`could not ask for events: ${error instanceof Error ? error.message : error}`);
      await new Promise((resolve) => setTimeout(resolve, PATIENCE_MS));
      continue;
    }
    if (message) await dealWith(message, url, parked, ackWaitMs);
  }
  // Sends what is still unsent, acknowledgements above all.
  await connection.drain();
  log("stopped");
}

main().catch((error) => {
  console.error(error instanceof Error ? error.message : error);
  process.exit(1);
});
