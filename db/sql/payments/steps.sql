-- Steps: inserting them is the only way to change a payment's state. The trigger below projects them and tells the
-- outbox and the audit trail, once per statement, for all payments of a batch.

create or replace function surety.project_steps() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_now timestamptz := surety.time_now();
    v_generation integer := outbox.current_restore_generation();
    v_is_later boolean := exists (select from new_steps as n where n.version > 1);
begin
    -- Who inserts a payment or changes its amounts has written the projection along; here it is made for the others.
    if v_is_later then
        update surety.payments as p
        set version = last.version, state = last.to_state, updated_at = last.at,
            poll_at = last.at + s.poll_after, poll_count = 0,
            next_action = case when last.to_state = 'requires_action' then p.next_action end
        from (
            select distinct on (n.payment_id) n.payment_id, n.version, n.to_state, n.at
            from new_steps as n
            order by n.payment_id, n.version desc
        ) as last
        join surety.states as s on s.state = last.to_state
        where p.id = last.payment_id and p.version < last.version;
    end if;

    with told as materialized (
        select
            n.payment_id, n.version, n.from_state, n.to_state, n.cause, n.implied, n.at, n.actor, n.request_id,
            p.merchant_id, p.captured_minor, p.refunded_minor, p.provider_id, p.failure, p.next_action
        from new_steps as n
        join surety.payments as p on p.id = n.payment_id
        order by n.payment_id, n.version
    ),
    emitted as (
        insert into outbox.events (id, aggregate_type, aggregate_id, type, payload, merchant_id, version, generation)
        select
            surety.new_id('evt', v_now), 'payment', t.payment_id, 'payment.' || t.to_state,
            jsonb_strip_nulls(jsonb_build_object(
                'payment_id', t.payment_id, 'state', t.to_state, 'version', t.version, 'at', surety.format_time(t.at),
                'amount_captured', nullif(t.captured_minor, 0), 'amount_refunded', nullif(t.refunded_minor, 0),
                'provider_id', t.provider_id, 'failure', t.failure,
                'next_action', case when t.to_state = 'requires_action' then t.next_action end)),
            t.merchant_id, t.version, v_generation
        from told as t
    )
    insert into audit.entries (
        id, at, kind, actor, request_id, payment_id, merchant_id, version, from_state, to_state, outcome, reason,
        snapshot
    )
    select
        surety.new_id('aud', v_now), t.at, 'step', t.actor, t.request_id, t.payment_id, t.merchant_id, t.version,
        t.from_state, t.to_state, case when t.implied then 'implied' else 'done' end, t.cause, '{}'
    from told as t
    -- The request that makes a payment tells its first step itself, with what only it knows.
    where t.version > 1 or t.cause <> 'request';

    if not v_is_later then
        return null;
    end if;

    -- A reference is free again once its payment has failed or was canceled, and taken back if it succeeds after all.
    if exists (select from new_steps as n where n.to_state in ('failed', 'canceled')) then
        delete from surety.payment_references as r
        using new_steps as n join surety.payments as p on p.id = n.payment_id
        where n.to_state in ('failed', 'canceled') and r.payment_id = n.payment_id
            and r.merchant_id = p.merchant_id and r.reference = p.reference;
    end if;
    if exists (select from new_steps as n where n.from_state in ('failed', 'canceled')) then
        with again as (
            select p.merchant_id, p.reference, p.id
            from new_steps as n join surety.payments as p on p.id = n.payment_id
            where n.from_state in ('failed', 'canceled') and p.reference is not null
        ),
        taken as (
            insert into surety.payment_references (merchant_id, reference, payment_id)
            select a.merchant_id, a.reference, a.id from again as a
            order by a.merchant_id, a.reference
            on conflict (merchant_id, reference) do nothing
            returning payment_id
        )
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, opened_at)
        select
            surety.new_id('dis', v_now), 'duplicate', a.id, a.id,
            'it succeeded after it had ended, and its reference belongs to another payment by now', v_now
        from again as a where a.id not in (select t.payment_id from taken as t)
        on conflict (kind, subject) do nothing;
    end if;

    update outbox.dead_letters as d
    set closed_at = v_now, closed_as = 'resolved', closed_by = 'system',
        closed_because = 'the payment is ' || n.to_state
    from new_steps as n join surety.states as s on s.state = n.to_state
    where d.payment_id = n.payment_id and d.type like 'payment.%' and d.closed_at is null and s.is_final;
    return null;
end;
$$;

create or replace trigger steps_are_projected after insert on surety.steps
referencing new table as new_steps for each statement execute function surety.project_steps();
