-- From confirmed to settled: the expectation, the polling of balance transactions, and the close.

create or replace function surety.open_settlement_expectation(p_batch bigint, p_fence bigint, p_event_ids text[])
returns boolean language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- payment.confirmed: money should arrive, also of what was disputed or refunded by now. Only payment.settled closes the
-- expectation, be it handled before or after. Effects and completion are one transaction.
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

create or replace function surety.close_settlement_expectation(p_batch bigint, p_fence bigint, p_event_ids text[])
returns boolean language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- payment.settled: what was expected has come. The payment may be settled before its expectation was opened.
declare
    v_now timestamptz := surety.time_now();
begin
    insert into surety.expectations as x (payment_id, kind, opened_at, due_at, met_at)
    -- It may have settled twice: a refund in between has come back.
    select distinct e.aggregate_id, 'settlement', v_now, v_now, v_now
    from outbox.batch_events(p_batch, p_fence) as e
    where e.event_id = any(p_event_ids)
    order by e.aggregate_id
    on conflict (payment_id, kind) do update set met_at = coalesce(x.met_at, excluded.met_at);
    update surety.discrepancies as d
    set closed_at = v_now, closed_because = 'it settled'
    from outbox.batch_events(p_batch, p_fence) as e
    where e.event_id = any(p_event_ids) and d.kind = 'overdue' and d.subject = e.aggregate_id and d.closed_at is null;
    return outbox.complete_events(p_batch, p_fence, p_event_ids);
end;
$$;

create or replace function surety.open_overdue_discrepancies(p_limit integer default 500) returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with opened as (
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, opened_at)
        select
            surety.new_id('dis', surety.time_now()),
            'overdue',
            expectations.payment_id,
            expectations.payment_id,
            expectations.kind || ' was expected by ' || surety.format_time(expectations.due_at),
            surety.time_now()
        from surety.expectations
        where
            expectations.met_at is null and expectations.due_at < surety.time_now()
            -- Those that were told of already must not use up the limit.
            and not exists (
                select from surety.discrepancies
                where discrepancies.kind = 'overdue' and discrepancies.subject = expectations.payment_id
            )
        order by expectations.due_at
        limit p_limit
        on conflict (kind, subject) do nothing
        returning discrepancies.id
    )

    select count(*)::integer from opened;
end;

create or replace function surety.cancel_expired_actions(p_after interval, p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Payments whose payer has been asked to act for longer than p_after: an event each, once, for whoever cancels them.
-- Every unfinished payment has poll_at, so that index finds them. Returns the types of the events made.
declare
    v_now timestamptz := surety.time_now();
    v_ids text[];
begin
    select array_agg(overdue.id) into v_ids
    from (
        select p.id
        from surety.payments as p
        join surety.steps as s on s.payment_id = p.id and s.version = p.version
        where p.poll_at is not null and p.state = 'requires_action' and s.at < v_now - p_after
            and not p.flags ? 'overdue_at'
        order by p.id
        limit p_limit
        for update of p skip locked
    ) as overdue;
    if v_ids is null then
        return '{}';
    end if;
    update surety.payments as p
    set flags = p.flags || jsonb_build_object('overdue_at', surety.format_time(v_now))
    where p.id = any(v_ids);
    perform outbox.emit_event(
        'payment', p.id, 'payment.action_overdue', jsonb_build_object('payment_id', p.id, 'reason', 'overdue'),
        null, p.version)
    from surety.payments as p where p.id = any(v_ids);
    return array['payment.action_overdue'];
end;
$$;
