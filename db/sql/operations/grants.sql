-- Rights: a running role executes its functions and reads its views, nothing else. A test compares the rights in the
-- database with tests/support/grants.txt.

revoke all on all functions in schema surety, ledger, outbox, audit, api from public;
grant usage on schema surety, api to surety_api;
grant usage on schema surety, outbox to surety_webhook;
grant usage on schema surety, outbox, audit, ledger to surety_worker;
grant usage on schema report to surety_analyst, surety_auditor;
grant usage on schema surety to surety_auditor;

grant execute on function
api.identify_merchant(bytea, text, text),
api.lease_permits(jsonb),
api.check_amount_bounds(bigint, text),
api.create_payments(json),
api.capture_payment(jsonb),
api.cancel_payment(jsonb),
api.create_refund(jsonb),
api.get_refund(bytea, text, text, text),
api.list_refunds(bytea, text, integer, text, text),
api.submit_evidence(jsonb),
api.get_dispute(bytea, text, text),
api.list_disputes(bytea, text, integer, text, text),
api.get_balance(bytea, text),
api.list_balance_transactions(bytea, text, integer, text, text),
api.get_statement(bytea, date, integer, text, text),
api.audit_denial(bytea, text, text, text, text, text),
api.explain_denial(bytea, text, text),
api.note_key_uses(bytea[]),
api.create_customer(jsonb),
api.update_customer(jsonb),
api.get_customer(bytea, text, text),
api.list_customers(bytea, text, integer, text, text),
api.list_payment_methods(bytea, text, integer, text, text),
api.detach_payment_method(jsonb),
api.get_payment(bytea, text, text, text),
api.list_payments(bytea, text, text, text, timestamptz, timestamptz, integer, text, jsonb, text),
api.list_events(bytea, text, integer, text, text, text),
api.get_event(bytea, text, text),
api.read_sealing_key(),
api.create_webhook_endpoint(jsonb),
api.update_webhook_endpoint(jsonb),
api.switch_webhook_endpoint(jsonb),
api.rotate_webhook_secret(jsonb),
api.delete_webhook_endpoint(jsonb),
api.replay_webhook_events(jsonb),
api.get_webhook_endpoint(bytea, text, text),
api.list_webhook_endpoints(bytea, text),
api.list_deliveries(bytea, text, text, text, integer, text, text),
api.list_currencies(bytea, text),
api.update_payment(jsonb),
api.find_ended_waits(text[], text[], text[], text[], integer[], text[], text[]),
api.request_client_secret(jsonb),
api.take_client_secret(bytea, text, text),
api.read_position(bytea, text, text),
api.get_trace(bytea, text, text),
api.identify_operator(bytea, text, text),
api.explain_operator_denial(bytea, text, text, text, boolean, text),
api.list_dead_letters(bytea, text, text, text, integer, text, text),
api.get_dead_letter(bytea, text, text),
api.replay_dead_letter(bytea, text, text, boolean, text, text),
api.discard_dead_letter(bytea, text, text, boolean, text, text),
api.list_holds(bytea, text, text, integer, text, text),
api.get_hold(bytea, text, text),
api.decide_hold(bytea, text, text, text, text, text),
api.list_discrepancies(bytea, jsonb, integer, text, text),
api.get_discrepancy(bytea, text, text),
api.assign_discrepancy(bytea, text, text, text, text, text),
api.snooze_discrepancy(bytea, text, timestamptz, text, text, text),
api.resolve_discrepancy(bytea, text, text, text, boolean, text, text),
api.resolve_discrepancies(bytea, jsonb, integer, text, text, boolean, text, text),
api.get_status(bytea, text)
to surety_api;
grant usage on schema outbox to surety_api;
grant execute on function outbox.schedule_handlers(text[], boolean) to surety_api, surety_webhook, surety_worker;

grant execute on function
surety.receive_webhooks(jsonb),
surety.store_rejected_webhook(text, text, text, jsonb, bytea, text, integer)
to surety_webhook;

grant execute on function surety.count_refusals(text, jsonb) to surety_api, surety_webhook;
grant execute on function surety.read_livemode() to surety_api, surety_worker;
grant execute on function outbox.provider_refusal(boolean) to surety_worker;

grant execute on function
surety.maintain_partitions(integer),
surety.record_facts(jsonb, text, text),
surety.record_results(text, jsonb),
surety.next_fetch_number(text, text, boolean, text),
surety.begin_calls(bigint, bigint, text, text, text[]),
surety.begin_customer_calls(bigint, bigint, text, text, text[]),
surety.replace_customer_call_key(text, text),
surety.reserve_request_slots(text, text, double precision, boolean, integer),
surety.emit_expired_actions(interval, integer),
surety.end_refused_payments(text, integer),
surety.expire_holds(text, integer),
surety.delete_old_accepted_money(),
ledger.end_days(),
ledger.sum_day(),
surety.create_due_merchant_payouts(text, integer),
surety.delete_old_secret_requests(),
surety.open_secret_requests(bigint, bigint, text[]),
surety.answer_secret_requests(bigint, bigint, text[], jsonb),
surety.objects_without_facts(jsonb),
surety.events_not_received(text, text, text[]),
surety.accounts_of_merchants(text[]),
surety.store_polled_events(jsonb),
surety.replace_call_key(text, text),
surety.claim_objects_to_poll(integer),
surety.read_clock(),
surety.take_lock(text, interval),
surety.count_call_results(text, jsonb, text),
surety.open_circuit(text, text, text, text, text),
surety.close_circuit(text, text, text, text),
surety.claim_circuit_probes(text),
surety.hold_blocked_events(bigint, bigint, text[]),
surety.emit_evidence_reminders(interval, integer),
surety.read_provider_events(bigint, bigint),
surety.saved_methods_among(text, text[]),
surety.record_method_state(text, jsonb, boolean),
surety.expect_settlement(bigint, bigint, text[]),
surety.meet_expected_settlement(bigint, bigint, text[]),
surety.open_overdue_discrepancies(integer),
surety.poll_windows(text, interval),
surety.advance_poll_cursor(text, text, text, timestamptz),
surety.claim_pending_money(integer, interval),
surety.retry_unmatched_facts(integer),
surety.claim_payouts_to_poll(integer),
surety.match_bank_lines(integer),
surety.claim_payout_lines(integer),
surety.record_payout_lines(text, text, jsonb),
surety.end_payout_lines(text, text),
surety.delete_expired_idempotency_keys(integer),
surety.delete_old_refusals(),
surety.delete_whole_bursts(),
surety.record_periodic_job(text, interval, text),
surety.accounts_to_check(text),
surety.key_check_is_due(text, text),
surety.record_key_check(text, boolean, boolean, text, text[], text),
surety.note_failed_key_check(text, boolean, boolean, text, text),
surety.note_unreadable_list(text, text, text, text, boolean),
outbox.list_handlers(),
outbox.claim_batch(text, text, interval),
outbox.batch_events(bigint, bigint),
outbox.complete_events(bigint, bigint, text[]),
outbox.renew_lease(bigint, bigint),
outbox.fail_events(bigint, bigint, jsonb),
outbox.release_events(bigint, bigint, text[], interval, text, text, text, boolean),
outbox.has_work(text),
outbox.schedule_due_handlers(),
outbox.schedule_work_since(text),
outbox.delete_orphaned_jobs(),
outbox.publish_sealing_key(text, bytea),
outbox.find_due_endpoints(pg_snapshot, boolean),
outbox.claim_deliveries(text, text[], integer, interval),
outbox.renew_deliveries(bigint[], interval),
outbox.read_deliveries(text[]),
outbox.record_deliveries(text, jsonb),
outbox.drop_old_delivery_attempts(interval),
audit.write_entries(jsonb)
to surety_worker;

-- Procrastinate's workers use its tables directly.
grant usage on schema procrastinate to surety_worker;
grant select, insert, update, delete on all tables in schema procrastinate to surety_worker;
grant usage on all sequences in schema procrastinate to surety_worker;
grant execute on all functions in schema procrastinate to surety_worker;

-- A view reads tables by its owner's rights, but calls functions by its reader's.
grant select on all tables in schema report to surety_analyst, surety_auditor;
grant execute on function surety.payment_status(text, text) to surety_analyst, surety_auditor;
grant usage on schema audit to surety_auditor;
grant select on audit.trail to surety_auditor;
grant execute on function surety.trace_payment(text), surety.payment_summary(text), surety.check_invariants() to
surety_auditor;

grant usage on schema invariant to surety_auditor;
grant select on all tables in schema invariant to surety_auditor;
grant execute on function
ledger.balances_at(timestamptz),
ledger.month_end(date),
outbox.is_before(outbox.log_position, integer, xid8, text),
outbox.is_wanted(text, text[]),
outbox.position_of(outbox.webhook_endpoints),
surety.derive_payments(text[]),
surety.fold_email(text),
surety.fold_letters(text),
surety.label_object(jsonb, jsonb, text),
surety.labels_of_payment(surety.payments),
surety.read_clock(),
surety.dispute_status(text, jsonb),
surety.dispute_withdrawn(text, bigint),
surety.missing_dispute_postings(text, text),
surety.id_at(text, timestamptz),
surety.count_accepted_money(text, text, date),
surety.show_hold(text, timestamptz, timestamptz, timestamptz),
surety.format_time(timestamptz)
to surety_auditor;
