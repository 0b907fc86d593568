-- Refunds: their steps, projected, and what facts make of them.
--
-- Refunds: a merchant asks for one and the amount is taken up at once; the provider makes it. Or it was made there.
--
--   ask       api.create_refund: money out is reserved in the transaction that asks for it
--   send      surety.begin_calls: what will be sent is committed first; surety.fail_refused_refunds if it is not
--   taken
--   advance   surety.advance_refunds: what facts say of refunds, as rows and steps
--   project   a trigger: the refund's row, its event, its audit entry
--   poll      surety.claim_objects_to_poll
--   read      api.get_refund, api.list_refunds

create or replace function surety.project_refund_steps() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_generation integer := outbox.current_restore_generation();
begin
    update surety.refunds as r
    set version = last.version, state = last.to_state, updated_at = last.at, poll_at = last.at + s.poll_after,
        poll_count = 0
    from (
        select distinct on (n.refund_id) n.refund_id, n.version, n.to_state, n.at
        from new_steps as n
        order by n.refund_id, n.version desc
    ) as last
    join surety.refund_states as s on s.state = last.to_state
    where r.id = last.refund_id;

    insert into outbox.events (id, aggregate_type, aggregate_id, type, payload, merchant_id, version, generation)
    select
        surety.new_id('evt', v_now), 'refund', n.refund_id, 'refund.' || n.to_state,
        jsonb_strip_nulls(jsonb_build_object(
            'payment_id', r.payment_id, 'refund_id', r.id, 'state', n.to_state, 'version', n.version,
            'at', surety.format_time(n.at), 'amount', r.amount_minor, 'provider_id', r.provider_id,
            'failure', case when n.to_state in ('failed', 'canceled') then r.failure end)),
        r.merchant_id, n.version, v_generation
    from new_steps as n
    join surety.refunds as r on r.id = n.refund_id
    order by n.refund_id, n.version;

    insert into audit.entries (
        id, at, kind, actor, request_id, payment_id, merchant_id, from_state, to_state, outcome, reason, snapshot
    )
    select
        surety.new_id('aud', v_now), n.at, 'refund', n.actor, n.request_id, r.payment_id, r.merchant_id, n.from_state,
        n.to_state, 'done', n.cause,
        jsonb_build_object('refund', r.id, 'amount', r.amount_minor, 'currency', r.currency, 'version', n.version)
    from new_steps as n
    join surety.refunds as r on r.id = n.refund_id
    order by n.refund_id, n.version;

    update outbox.dead_letters as d
    set closed_at = v_now, closed_as = 'resolved', closed_by = 'system',
        closed_because = 'the refund is ' || n.to_state
    from new_steps as n
    where d.type = 'refund.pending' and d.payload ->> 'refund_id' = n.refund_id and d.closed_at is null
        and n.to_state in ('succeeded', 'failed', 'canceled');
    return null;
end;
$$;

create or replace trigger refund_steps_are_projected after insert on surety.refund_steps
referencing new table as new_steps for each statement execute function surety.project_refund_steps();

create or replace trigger refund_steps_are_append_only before update or delete or truncate on surety.refund_steps
for each statement execute function audit.refuse_change();

create or replace function surety.current_refund_fact(p_refund surety.refunds)
returns table (state text, amount_minor bigint, failure jsonb, source text)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- What the provider says of its refund: the fact of the highest rank.
    select
        case facts.kind when 'refund_action' then 'requires_action' else substr(facts.kind, 8) end,
        facts.amount_minor,
        facts.data -> 'failure',
        facts.source
    from surety.facts
    inner join surety.fact_kinds on facts.kind = fact_kinds.kind
    where
        facts.payment_id = p_refund.payment_id and facts.object_id = p_refund.provider_id
        and facts.provider = p_refund.provider and facts.account = p_refund.provider_account
        and fact_kinds.family = 'refund' and facts.disregarded is null
    order by fact_kinds.rank desc
    limit 1;
end;

create or replace function surety.advance_refunds(
    p_facts surety.facts[], p_actor text, p_request_id text
) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Brings the refunds that new facts tell of to what all their facts say; payments are locked, the facts stored. One
-- that nobody asked for here was made at the provider, and gets its row. Returns the types of the events made.
declare
    v_now timestamptz := surety.time_now();
    v_told surety.facts [];
    v_made text [];
    v_types text [];
begin
    select array_agg(f::surety.facts order by f.payment_id, f.object_id) into v_told
    from (
        select distinct on (g.provider, g.account, g.object_id) g.*
        from unnest(p_facts) as g
        where g.kind like 'refund\_%' and g.disregarded is null and g.amount_minor > 0
        order by g.provider, g.account, g.object_id, g.data ? 'refund' desc
    ) as f;
    if v_told is null then
        return '{}';
    end if;

    update surety.refunds as r
    set provider_id = t.object_id
    from (
        select distinct on (f.data ->> 'refund') f.* from unnest(v_told) as f
        where not exists (
            select from surety.refunds as k
            where k.provider = f.provider and k.provider_account = f.account and k.provider_id = f.object_id
        )
        order by f.data ->> 'refund', f.object_id
    ) as t
    where r.id = t.data ->> 'refund' and r.payment_id = t.payment_id and r.provider_id is null and r.state = 'pending';

    with unknown as (
        select f.* from unnest(v_told) as f
        where not exists (
            select from surety.refunds as k
            where k.provider = f.provider and k.provider_account = f.account and k.provider_id = f.object_id
        )
    ),
    told as (
        insert into surety.refunds (
            id, payment_id, merchant_id, amount_minor, currency, reason, provider, provider_account, provider_id,
            is_ours, created_at, updated_at
        )
        select
            surety.new_id('ref', v_now), p.id, p.merchant_id, u.amount_minor, p.currency, u.data ->> 'reason',
            u.provider, u.account, u.object_id, false, v_now, v_now
        from unknown as u join surety.payments as p on p.id = u.payment_id
        order by u.payment_id, u.object_id
        returning id
    )
    select array_agg(t.id) into v_made from told as t;
    insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor, request_id)
    select made.id, 1, null, 'pending', v_told[1].source, v_now, p_actor, p_request_id
    from unnest(v_made) as made (id) order by made.id;
    perform surety.open_discrepancy(
        'duplicate', f.object_id, f.payment_id,
        format('%s was made for %s, which was made or refused already', f.object_id, f.data ->> 'refund'),
        to_jsonb(f), true, v_now)
    from unnest(v_told) as f
    join surety.refunds as r on r.provider = f.provider and r.provider_account = f.account
        and r.provider_id = f.object_id
    where r.id = any(v_made) and f.data ? 'refund';

    -- The amount that was really refunded is booked, whatever was asked for.
    with standing as materialized (
        select r.id, r.payment_id, r.amount_minor as asked_minor, best.amount_minor, best.failure
        from unnest(v_told) as t
        join surety.refunds as r on r.provider = t.provider and r.provider_account = t.account
            and r.provider_id = t.object_id
        cross join lateral surety.current_refund_fact(r) as best
        where r.amount_minor <> best.amount_minor or r.failure is distinct from best.failure
    ),
    contradicted as (
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, is_critical, opened_at)
        select
            surety.new_id('dis', v_now), 'amount', s.id, s.payment_id,
            format('%s was refunded instead of %s', s.amount_minor, s.asked_minor), true, v_now
        from standing as s where s.amount_minor <> s.asked_minor
        on conflict (kind, subject) do nothing
    )
    update surety.refunds as r
    set amount_minor = s.amount_minor, failure = s.failure
    from standing as s
    where r.id = s.id;

    with walked as (
        insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor, request_id)
        select r.id, r.version + 1, r.state, best.state, best.source, v_now, p_actor, p_request_id
        from unnest(v_told) as t
        join surety.refunds as r on r.provider = t.provider and r.provider_account = t.account
            and r.provider_id = t.object_id
        cross join lateral surety.current_refund_fact(r) as best
        where best.state <> r.state
        order by r.id
        returning to_state
    )
    select array_agg(distinct 'refund.' || w.to_state) into v_types from walked as w;
    return coalesce(v_types, '{}');
end;
$$;
