-- Expected settlements: expected from a payment's confirmation on, met when it settles, overdue after seven days.

create or replace function surety.expect_settlement(p_batch bigint, p_fence bigint, p_event_ids text[])
returns boolean language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
declare
    v_now timestamptz := surety.time_now();
begin
    insert into surety.expectations (payment_id, kind, opened_at, due_at)
    select distinct e.aggregate_id, 'settlement', v_now, v_now + interval '7 days'
    from outbox.batch_events(p_batch, p_fence) as e
    where e.event_id = any(p_event_ids)
    order by e.aggregate_id
    on conflict (payment_id, kind) do nothing;
    return outbox.complete_events(p_batch, p_fence, p_event_ids);
end;
$$;

comment on function surety.expect_settlement(bigint, bigint, text[]) is
'Handles payment.confirmed: money should arrive within seven days, also for a payment that was disputed or refunded
meanwhile. Only payment.settled or payment.money_available meets the expectation, whichever is handled first.
Completes the events in the same transaction; false if the lease is lost.';

create or replace function surety.meet_expected_settlement(p_batch bigint, p_fence bigint, p_event_ids text[])
returns boolean language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
declare
    v_now timestamptz := surety.time_now();
begin
    insert into surety.expectations as x (payment_id, kind, opened_at, due_at, met_at)
    select distinct e.aggregate_id, 'settlement', v_now, v_now, v_now
    from outbox.batch_events(p_batch, p_fence) as e
    where e.event_id = any(p_event_ids)
    order by e.aggregate_id
    on conflict (payment_id, kind) do update set met_at = coalesce(x.met_at, excluded.met_at);
    perform surety.close_discrepancies('overdue', array_agg(e.aggregate_id), 'it settled', v_now)
    from outbox.batch_events(p_batch, p_fence) as e
    where e.event_id = any(p_event_ids);
    return outbox.complete_events(p_batch, p_fence, p_event_ids);
end;
$$;

comment on function surety.meet_expected_settlement(bigint, bigint, text[]) is
'Handles payment.settled and, after a loss, payment.money_available: the expected money has arrived, and an overdue
discrepancy is closed. A payment may settle before its settlement is expected, and may settle twice: after a refund that
has come back. Completes the events in the same transaction; false if the lease is lost.';

create or replace function surety.open_overdue_discrepancies(p_limit integer default 500) returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with overdue as (
        select
            expectations.payment_id,
            expectations.kind,
            expectations.due_at
        from surety.expectations
        where
            expectations.met_at is null and expectations.due_at < surety.time_now()
            -- Expectations reported before must not count towards the limit.
            and not exists (
                select from surety.discrepancies
                where discrepancies.kind = 'overdue' and discrepancies.subject = expectations.payment_id
            )
        order by expectations.due_at
        limit p_limit
    ),

    opened as (
        select
            surety.open_discrepancy(
                'overdue', overdue.payment_id, 'warning',
                overdue.kind || ' was expected by ' || surety.format_time(overdue.due_at),
                jsonb_build_array(
                    surety.differing_value(overdue.kind, 'by ' || surety.format_time(overdue.due_at), null)
                ),
                overdue.payment_id, null, surety.time_now(), p_payment_id => overdue.payment_id
            ) as id
        from overdue
    )

    select count(opened.id)::integer from opened;
end;

comment on function surety.open_overdue_discrepancies(integer) is
'Opens a discrepancy for each expectation that is due and not met, at most p_limit, the longest overdue first. Returns
their number.';
