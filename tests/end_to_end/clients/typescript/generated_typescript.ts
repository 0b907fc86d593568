// A merchant's program on types that openapi-typescript generates: make, capture, refund, list, read events.
// `node generated_typescript.js URL KEY` prints JSON; the generated types are in ./surety.d.ts.

import createClient from "openapi-fetch";
import type { components, paths } from "./surety.js";

declare const process: { argv: string[] };

type Event = components["schemas"]["Event"];

const [url = "", key = ""] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${key}` } });

/** The header that makes a request safe to repeat. */
function once(): { "Idempotency-Key": string } {
  return { "Idempotency-Key": crypto.randomUUID() };
}

/** The document of an answer. Throws with the detail of a problem. */
function documentOf<T>(answer: { data?: T; error?: { detail?: string } }): T {
  if (answer.data === undefined) throw new Error(answer.error?.detail ?? "no document");
  return answer.data;
}

/** The amount of an event: `type` says which object its data is. Customers and saved payment methods have none. */
function amountOf(event: Event): number {
  switch (event.type) {
    case "payment.confirmed":
      return event.data.amount_captured;
    case "dispute.needs_response":
      return event.data.amount_withdrawn;
    default:
      return "amount" in event.data ? event.data.amount : 0;
  }
}

const wait = { Prefer: "wait=30" };
const body = {
  amount: 5000,
  currency: "usd",
  payment_method: { type: "card", token: "pm_card_visa" },
  capture_method: "manual",
  return_url: "https://shop.example/return",
  metadata: { cart: "9=3*3" },
} satisfies components["schemas"]["NewPayment"];

const made = documentOf(await client.POST("/v1/payments", { params: { header: once() }, body }));
const path = { payment_id: made.id };
const held = documentOf(await client.GET("/v1/payments/{payment_id}", { params: { path, header: wait } }));
const status: components["schemas"]["PaymentStatus"] = held.status;
const captured = documentOf(
  await client.POST("/v1/payments/{payment_id}/capture", {
    params: { path, header: { ...once(), ...wait } },
    body: { amount: 4000 },
  }),
);
const refund = documentOf(
  await client.POST("/v1/payments/{payment_id}/refunds", {
    params: { path, header: { ...once(), ...wait } },
    body: { amount: 1000 },
  }),
);
const found = await client.GET("/v1/payments", {
  params: { query: { status: "partially_refunded", metadata_is: ["cart=9=3*3"] } },
});
const page = documentOf(found);
const none = documentOf(await client.GET("/v1/payments", { params: { query: { metadata: { cart: "8" } } } }));
const events = documentOf(await client.GET("/v1/events", { params: { query: { object: made.id } } }));
const refused = await client.POST("/v1/payments", { params: { header: { "Idempotency-Key": "x".repeat(256) } }, body });

console.log(
  JSON.stringify({
    payment: made.id,
    status,
    captured: captured.amount_captured,
    refund: refund.status,
    listed: [...page.data, ...none.data].map((payment) => payment.id),
    confirmed: events.data.filter((event) => event.type === "payment.confirmed").map(amountOf),
    refused: refused.error?.title,
  }),
);
