-- Who may do what, whole. A running role executes its functions and reads its views, nothing else; tests compare the
-- database's grants with this file's.

revoke all on all functions in schema surety, ledger, outbox, audit, api from public;
grant usage on schema surety, api to surety_api;
grant usage on schema surety, outbox to surety_webhook;
grant usage on schema surety, outbox, audit to surety_worker;
grant usage on schema report to surety_analyst, surety_auditor;
grant usage on schema surety to surety_auditor;

grant execute on function
api.identify(bytea),
api.judge_amount(bigint, text),
api.create_payments(json),
api.capture_payment(jsonb),
api.cancel_payment(jsonb),
api.create_refund(jsonb),
api.get_refund(bytea, text),
api.list_refunds(bytea, text, integer, text),
api.submit_evidence(jsonb),
api.get_dispute(bytea, text),
api.list_disputes(bytea, text, integer, text),
api.get_balance(bytea),
api.list_balance_transactions(bytea, text, integer, text),
api.deny(bytea, text, text, text, text),
api.get_payment(bytea, text),
api.list_payments(bytea, text, text, text, timestamptz, timestamptz, integer, text),
api.list_events(bytea, text, integer),
api.get_trace(bytea, text),
api.identify_operator(bytea),
api.deny_operator(bytea, text, text, text, boolean),
api.list_dead_letters(bytea, text, text, text, integer, text),
api.get_dead_letter(bytea, text),
api.replay_dead_letter(bytea, text, text, boolean, text, text),
api.discard_dead_letter(bytea, text, text, boolean, text, text),
api.read_status(bytea)
to surety_api;
grant usage on schema outbox to surety_api;
grant execute on function outbox.kick(text[]) to surety_api, surety_webhook, surety_worker;

grant execute on function
surety.receive_webhooks(jsonb),
surety.reject_webhook(text, text, jsonb, bytea, text)
to surety_webhook;

grant execute on function
surety.maintain_partitions(integer),
surety.record_facts(jsonb, text, text),
surety.record_results(bigint, bigint, text, jsonb),
surety.record_outcomes(text, jsonb),
surety.next_fetch(text, text, boolean, text),
surety.begin_calls(bigint, bigint, text, text, text[]),
surety.take_turn(text, text, double precision, boolean),
surety.call_off_overdue(interval, integer),
surety.unknown_facts(jsonb),
surety.unheard_events(text, text, text[]),
surety.receive_listed(jsonb),
surety.renew_call(text, text),
surety.claim_questions(integer),
surety.read_clock(),
surety.note_calls(text, jsonb, text),
surety.open_breaker(text, text, text, text),
surety.close_breaker(text, text, text, text),
surety.claim_probes(text),
surety.hold_blocked(bigint, bigint, text[]),
surety.begin_refunds(bigint, bigint, text, text[]),
surety.claim_refund_questions(integer),
surety.begin_evidence(bigint, bigint, text, text[]),
surety.remind_evidence(interval, integer),
surety.claim_dispute_questions(integer),
surety.read_inbox(bigint, bigint),
surety.expect_settlement(bigint, bigint, text[]),
surety.close_settled(bigint, bigint, text[]),
surety.open_overdue(integer),
surety.lists_to_poll(text, interval),
surety.polled(text, text, text, timestamptz),
surety.claim_money(integer, interval),
surety.retry_parked(integer),
surety.forget_idempotency_keys(integer),
outbox.list_handlers(),
outbox.claim(text, text),
outbox.claim_batch(text, text),
outbox.batch_events(bigint, bigint),
outbox.finish(bigint, bigint, text[]),
outbox.renew(bigint, bigint),
outbox.fail(bigint, bigint, jsonb),
outbox.release(bigint, bigint, text[], interval, text, text, boolean),
outbox.has_work(text),
outbox.kick_due(),
outbox.forget_jobs(),
audit.record(jsonb)
to surety_worker;

-- Procrastinate's workers use its tables directly.
grant usage on schema procrastinate to surety_worker;
grant select, insert, update, delete on all tables in schema procrastinate to surety_worker;
grant usage on all sequences in schema procrastinate to surety_worker;
grant execute on all functions in schema procrastinate to surety_worker;

grant select on all tables in schema report to surety_analyst, surety_auditor;
grant execute on function surety.trace(text), surety.sum_up(text), surety.check_invariants() to surety_auditor;
