-- Refunds: their steps, and how facts advance them. Merchants request some; others are made at the provider.
--
--   api.create_refund              reserves the amount in the transaction that asks for it
--   surety.begin_calls             commits the request before it is sent
--   surety.fail_refused_refunds    ends a refund that the provider refused
--   surety.advance_refunds         updates refunds from their facts; here
--   project_refund_steps           a trigger: the refund's row, its event, its audit entry; here
--   surety.claim_objects_to_poll   polls unfinished refunds
--   api.get_refund, api.list_refunds

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

    insert into outbox.events (
        id, aggregate_type, aggregate_id, type, payload, merchant_id, version, generation, at, traceparent
    )
    select
        surety.new_id('evt', v_now), 'refund', n.refund_id, 'refund.' || n.to_state,
        jsonb_strip_nulls(jsonb_build_object(
            'payment_id', r.payment_id, 'refund_id', r.id, 'state', n.to_state, 'version', n.version,
            'at', surety.format_time(n.at), 'amount', r.amount_minor, 'provider_id', r.provider_id,
            'failure', case when n.to_state in ('failed', 'canceled') then r.failure end)),
        r.merchant_id, n.version, v_generation, v_now, outbox.traceparent_of(n.refund_id)
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

comment on function surety.project_refund_steps() is
'Trigger: sets refunds'' state and version to their last new step, emits refund.<state> for each step and writes its
audit entry. Closes dead letters of refunds that have ended.';

create or replace trigger refund_steps_are_projected after insert on surety.refund_steps
referencing new table as new_steps for each statement execute function surety.project_refund_steps();

create or replace trigger refund_steps_are_append_only before update or delete or truncate on surety.refund_steps
for each statement execute function audit.refuse_change();

create or replace function surety.current_refund_fact(p_refund surety.refunds)
returns table (state text, amount_minor bigint, failure jsonb, source text)
language sql stable
begin atomic
    -- No set clause, so that PostgreSQL can inline the function.
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

comment on function surety.current_refund_fact(surety.refunds) is
'The deciding fact about a refund: the one of the highest rank, amount in minor units. No row without facts.';

create or replace function surety.link_refunds(p_facts surety.facts[]) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    update surety.refunds as r
    set provider_id = t.object_id
    from (
        select distinct on (f.data ->> 'refund') f.* from unnest(p_facts) as f
        where not exists (
            select from surety.refunds as k
            where k.provider = f.provider and k.provider_account = f.account and k.provider_id = f.object_id
        )
        order by f.data ->> 'refund', f.object_id
    ) as t
    where r.id = t.data ->> 'refund' and r.payment_id = t.payment_id and r.provider_id is null and r.state = 'pending';
end;
$$;

comment on function surety.link_refunds(surety.facts[]) is
'Stores the provider''s id in refunds that were requested here, from facts whose metadata carry our id.';

create or replace function surety.add_provider_refunds(
    p_facts surety.facts[], p_actor text, p_request_id text, p_at timestamptz
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_added text [];
begin
    with unknown as (
        select f.* from unnest(p_facts) as f
        where not exists (
            select from surety.refunds as k
            where k.provider = f.provider and k.provider_account = f.account and k.provider_id = f.object_id
        )
    ),
    added as (
        insert into surety.refunds (
            id, payment_id, merchant_id, amount_minor, currency, reason, provider, provider_account, provider_id,
            is_ours, created_at, updated_at
        )
        select
            surety.new_id('ref', p_at), p.id, p.merchant_id, u.amount_minor, p.currency, u.data ->> 'reason',
            u.provider, u.account, u.object_id, false, p_at, p_at
        from unknown as u join surety.payments as p on p.id = u.payment_id
        order by u.payment_id, u.object_id
        returning id
    )
    select array_agg(a.id) into v_added from added as a;
    insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor, request_id)
    select r.id, 1, null, 'pending', f.source, p_at, p_actor, p_request_id
    from unnest(p_facts) as f
    join surety.refunds as r on r.provider = f.provider and r.provider_account = f.account
        and r.provider_id = f.object_id
    where r.id = any(v_added)
    order by r.id;
    perform surety.open_discrepancy(
        'duplicate', f.object_id, 'critical',
        format('%s was made for %s, which was made or refused already', f.object_id, f.data ->> 'refund'),
        jsonb_build_array(
            surety.differing_value(
                'refund', (select ours.provider_id from surety.refunds as ours where ours.id = f.data ->> 'refund'),
                f.object_id)),
        f.data ->> 'refund', f.id, p_at, p_payment_id => f.payment_id, p_data => to_jsonb(f))
    from unnest(p_facts) as f
    join surety.refunds as r on r.provider = f.provider and r.provider_account = f.account
        and r.provider_id = f.object_id
    where r.id = any(v_added) and f.data ? 'refund'
    order by f.object_id;
end;
$$;

comment on function surety.add_provider_refunds(surety.facts[], text, text, timestamptz) is
'Adds refunds that were made at the provider, at their first step. One that carries the id of a refund of ours is a
second refund for it: a critical discrepancy.';

create or replace function surety.advance_refunds(
    p_facts surety.facts[], p_actor text, p_request_id text
) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_refunds surety.facts [];
    v_types text [];
begin
    select array_agg(f::surety.facts order by f.payment_id, f.object_id) into v_refunds
    from (
        select distinct on (g.provider, g.account, g.object_id) g.*
        from unnest(p_facts) as g
        where g.kind like 'refund\_%' and g.disregarded is null and g.amount_minor > 0
        order by g.provider, g.account, g.object_id, g.data ? 'refund' desc
    ) as f;
    if v_refunds is null then
        return '{}';
    end if;

    perform surety.link_refunds(v_refunds);
    perform surety.add_provider_refunds(v_refunds, p_actor, p_request_id, v_now);

    -- The refunded amount is posted, even if it differs from the requested one.
    perform surety.open_discrepancy(
        'amount', r.id, 'critical', format('%s was refunded instead of %s', best.amount_minor, r.amount_minor),
        jsonb_build_array(surety.differing_amount('amount', r.amount_minor, best.amount_minor)),
        r.id, t.id, v_now, p_payment_id => r.payment_id)
    from unnest(v_refunds) as t
    join surety.refunds as r on r.provider = t.provider and r.provider_account = t.account
        and r.provider_id = t.object_id
    cross join lateral surety.current_refund_fact(r) as best
    where r.amount_minor <> best.amount_minor
    order by r.id;
    update surety.refunds as r
    set amount_minor = best.amount_minor, failure = best.failure
    from unnest(v_refunds) as t
    join surety.refunds as k on k.provider = t.provider and k.provider_account = t.account
        and k.provider_id = t.object_id
    cross join lateral surety.current_refund_fact(k) as best
    where r.id = k.id and (k.amount_minor <> best.amount_minor or k.failure is distinct from best.failure);

    with walked as (
        insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor, request_id)
        select r.id, r.version + 1, r.state, best.state, best.source, v_now, p_actor, p_request_id
        from unnest(v_refunds) as t
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

comment on function surety.advance_refunds(surety.facts[], text, text) is
'Updates the refunds that new facts mention from all their facts: provider''s id, amount, failure, state. The facts are
stored, the payments locked. Returns the types of the emitted events.';
