-- Steps: inserting one is the only way to change a payment's state. A trigger projects new steps onto their payments,
-- emits their events and writes their audit entries, once per statement for all payments of a batch.

create or replace function surety.release_references(p_payment_ids text[]) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    delete from surety.payment_references as r
    using unnest(p_payment_ids) as released (id) join surety.payments as p on p.id = released.id
    where r.payment_id = p.id and r.merchant_id = p.merchant_id and r.reference = p.reference;
end;
$$;

comment on function surety.release_references(text[]) is
'Frees the references of payments that have failed or were canceled, for other payments of their merchants.';

create or replace function surety.reclaim_references(p_payment_ids text[], p_at timestamptz) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_taken text [];
begin
    with wanted as (
        select p.merchant_id, p.reference, p.id
        from unnest(p_payment_ids) as reclaimed (id) join surety.payments as p on p.id = reclaimed.id
        where p.reference is not null
    ),
    inserted as (
        insert into surety.payment_references (merchant_id, reference, payment_id)
        select w.merchant_id, w.reference, w.id from wanted as w
        order by w.merchant_id, w.reference
        on conflict (merchant_id, reference) do nothing
        returning payment_id
    )
    select array_agg(w.id) into v_taken from wanted as w where w.id not in (select i.payment_id from inserted as i);
    perform surety.open_discrepancy(
        'duplicate', p.id, 'warning',
        'it succeeded after it had ended, and its reference belongs to another payment by now',
        jsonb_build_array(surety.differing_value('payment with this reference', p.id, holder.payment_id)),
        p.id, holder.payment_id, p_at, p_payment_id => p.id)
    from unnest(v_taken) as taken (id) join surety.payments as p on p.id = taken.id
    -- The other payment may have ended meanwhile.
    left join surety.payment_references as holder
        on holder.merchant_id = p.merchant_id and holder.reference = p.reference
    order by p.id;
end;
$$;

comment on function surety.reclaim_references(text[], timestamptz) is
'Takes back the references of payments that succeeded after they had ended. Opens a discrepancy for each reference that
another payment has by now.';

create or replace function surety.project_steps() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
declare
    v_now timestamptz := surety.time_now();
    v_generation integer := outbox.current_restore_generation();
    v_is_later boolean := exists (select from new_steps as n where n.version > 1);
    -- These bounds exclude partitions before a statement begins.
    v_first_payment text;
    v_last_payment text;
    v_ended text [];
    v_revived text [];
    v_held text [];
begin
    select min(n.payment_id), max(n.payment_id) into v_first_payment, v_last_payment from new_steps as n;
    -- Statements that create payments or change their amounts set state and version themselves. Update the others.
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
        where p.id = last.payment_id and p.id between v_first_payment and v_last_payment and p.version < last.version;
    end if;

    with made_steps as materialized (
        select
            n.payment_id, n.version, n.from_state, n.to_state, n.cause, n.implied, n.at, n.actor, n.request_id,
            p.merchant_id, p.captured_minor, p.refunded_minor, p.reversed_minor, p.provider_id, p.failure, p.next_action
        from new_steps as n
        join surety.payments as p on p.id = n.payment_id
        where p.id between v_first_payment and v_last_payment
        order by n.payment_id, n.version
    ),
    emitted as (
        insert into outbox.events (
            id, aggregate_type, aggregate_id, type, payload, merchant_id, version, generation, at, traceparent
        )
        select
            surety.new_id('evt', v_now), 'payment', m.payment_id, 'payment.' || m.to_state,
            jsonb_strip_nulls(jsonb_build_object(
                'payment_id', m.payment_id, 'state', m.to_state, 'version', m.version, 'at', surety.format_time(m.at),
                'amount_captured', nullif(m.captured_minor, 0), 'amount_refunded', nullif(m.refunded_minor, 0),
                'amount_reversed', nullif(m.reversed_minor, 0), 'provider_id', m.provider_id, 'failure', m.failure,
                'next_action', case when m.to_state = 'requires_action' then m.next_action end)),
            m.merchant_id, m.version, v_generation, v_now, outbox.traceparent_of(m.payment_id)
        from made_steps as m
    )
    insert into audit.entries (
        id, at, kind, actor, request_id, payment_id, merchant_id, version, from_state, to_state, outcome, reason,
        snapshot
    )
    select
        surety.new_id('aud', v_now), m.at, 'step', m.actor, m.request_id, m.payment_id, m.merchant_id, m.version,
        m.from_state, m.to_state, case when m.implied then 'implied' else 'done' end, m.cause, '{}'
    from made_steps as m
    -- The request that creates a payment writes the entry of its first step, with the route and the key.
    where m.version > 1 or m.cause <> 'request';

    if not v_is_later then
        return null;
    end if;

    v_held := array(
        select n.payment_id
        from new_steps as n join surety.payment_holds as h on h.payment_id = n.payment_id
        where n.from_state = 'initiated' and h.closed_at is null
        order by n.payment_id
    );
    if v_held <> '{}' then
        perform surety.end_hold_of_step(n.payment_id, n.to_state, n.cause, n.actor, v_now)
        from new_steps as n where n.payment_id = any(v_held) and n.from_state = 'initiated';
    end if;
    v_ended := array(select n.payment_id from new_steps as n where n.to_state in ('failed', 'canceled'));
    if v_ended <> '{}' then
        perform surety.release_references(v_ended);
    end if;
    v_revived := array(select n.payment_id from new_steps as n where n.from_state in ('failed', 'canceled'));
    if v_revived <> '{}' then
        perform surety.reclaim_references(v_revived, v_now);
    end if;

    update outbox.dead_letters as d
    set closed_at = v_now, closed_as = 'resolved', closed_by = 'system',
        closed_because = 'the payment is ' || n.to_state
    from new_steps as n join surety.states as s on s.state = n.to_state
    where d.payment_id = n.payment_id and d.closed_at is null and s.is_final
        -- What was to be done about the payment's own intent. A second intent must still be canceled, and settlements
        -- are still to be expected and met.
        and d.type in (
            'payment.initiated', 'payment.released', 'payment.provider_submitted', 'payment.capture_requested',
            'payment.cancel_requested', 'payment.attempt_failed', 'payment.action_overdue', 'payment.authorized_late',
            'payment.client_secret_requested'
        );
    return null;
end;
$$;

comment on function surety.project_steps() is
'Trigger: sets payments'' state and version to their last new step, emits payment.<state> for each step and writes its
audit entry. Releases the references of payments that ended, closes their holds, and closes dead letters about the
intents of payments in a final state.';

create or replace trigger steps_are_projected after insert on surety.steps
referencing new table as new_steps for each statement execute function surety.project_steps();
