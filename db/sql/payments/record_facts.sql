-- Recording facts: the one way in for everything that a provider asserts about payments.
--
-- From the outside inwards:
--   surety.record_results         results of calls and polls: records them as below, then completes, releases or fails
--                                 their events
--   surety.record_call_results    results of calls: facts, refusals and discrepancies; closes the calls, audits the
--                                 answers
--   surety.record_facts           facts, whatever their source; here
--
-- The result does not depend on the order of facts or on repetitions. record_facts does, in this order:
--   match        to a payment, by match_fact; a fact without one is stored as unmatched
--   link         the provider's objects to their payment, for later facts
--   key          one fact per (provider, account, livemode, object, kind, revision); a known key changes nothing, and
--                is a discrepancy if it contradicts
--   cards        what a charge's first fact did not show of its card becomes a fact of its own
--   check        facts that can't be about their payment are disregarded
--   store        facts, and the balance transactions whose money is not available yet
--   advance      refunds and disputes, then payments: derive state and amounts from all facts, make the missing steps
--   follow up    cancel second and declined intents; show warnings of fraud
--   post         the ledger's transfers for each new cause

create or replace function surety.link_objects(p_objects surety.provider_objects[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
    insert into surety.provider_objects (provider, account, object_id, payment_id)
    select distinct on (o.provider, o.account, o.object_id) o.provider, o.account, o.object_id, o.payment_id
    from unnest(p_objects) as o
    where not exists (
        select from surety.provider_objects as k
        where k.provider = o.provider and k.account = o.account and k.object_id = o.object_id
    )
    order by o.provider, o.account, o.object_id
    on conflict (provider, account, object_id) do nothing;
end;
$$;

comment on function surety.link_objects(surety.provider_objects[]) is
'Remembers which payment each of a provider''s objects belongs to. The first payment stays.';

create or replace function surety.track_pending_money(p_facts surety.facts[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
    insert into surety.pending_money (provider, account, object_id, created_at, available_at)
    select f.provider, f.account, f.object_id, f.occurred_at, (f.data ->> 'available_at')::timestamptz
    from unnest(p_facts) as f
    where f.kind = 'money' and f.data ? 'available_at' and not exists (
        select from surety.fact_keys as k
        where k.provider = f.provider and k.account = f.account and k.livemode = f.livemode
            and k.object_id = f.object_id and k.kind = 'available' and k.revision = 0
    )
    order by f.provider, f.account, f.object_id
    on conflict (provider, account, object_id) do nothing;
    delete from surety.pending_money as m
    using unnest(p_facts) as f
    where f.kind = 'available' and m.provider = f.provider and m.account = f.account and m.object_id = f.object_id;
end;
$$;

comment on function surety.track_pending_money(surety.facts[]) is
'Notes new balance transactions whose money is not available yet, and forgets those that are available by now.';

create or replace function surety.late_cards(p_facts surety.facts[], p_new surety.facts[], p_at timestamptz)
returns surety.facts[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- After the payer's authentication the intent's event often comes first, and names its charge by its id only.
declare
    v_cards surety.facts [];
begin
    select array_agg(surety.new_fact(
        p_id => surety.new_id('fct', p_at), p_payment_id => c.payment_id, p_provider => c.provider,
        p_account => c.account, p_livemode => c.livemode, p_object_id => c.object_id, p_kind => 'card',
        p_data => jsonb_build_object('card', c.data -> 'card'), p_source => c.source, p_source_id => c.source_id,
        p_occurred_at => c.occurred_at, p_recorded_at => p_at))
    into v_cards
    from (
        select distinct on (f.provider, f.account, f.livemode, f.object_id) f.*
        from unnest(p_facts) as f
        where f.data ? 'card' and not exists (
                select from surety.facts as k
                where k.payment_id = f.payment_id and k.object_id = f.object_id and k.data ? 'card'
                    and k.disregarded is null
            )
            and not exists (
                select from unnest(p_new) as n
                where n.payment_id = f.payment_id and n.object_id = f.object_id and n.data ? 'card'
            )
        order by f.provider, f.account, f.livemode, f.object_id, f.id
    ) as c;
    if v_cards is null then
        return '{}';
    end if;
    with keyed as (
        insert into surety.fact_keys (provider, account, livemode, object_id, kind, revision, fact_id)
        select f.provider, f.account, f.livemode, f.object_id, f.kind, f.revision, f.id
        from unnest(v_cards) as f
        order by f.provider, f.account, f.livemode, f.object_id
        on conflict (provider, account, livemode, object_id, kind, revision) do nothing
        returning fact_id
    )
    select array_agg(f order by f.object_id) filter (where f.id in (select k.fact_id from keyed as k))
    into v_cards
    from unnest(v_cards) as f;
    return coalesce(v_cards, '{}');
end;
$$;

comment on function surety.late_cards(surety.facts[], surety.facts[], timestamptz) is
'Facts of the kind card, with their keys, for the charges among p_facts whose card no fact shows yet, neither stored nor
in p_new.';

create or replace function surety.record_facts(p_facts jsonb, p_actor text, p_request_id text default null)
returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
-- Locks facts, payments, refunds and accounts, each sorted.
declare
    v_now timestamptz := surety.time_now();
    v_facts surety.facts [];
    v_unmatched jsonb [];
    v_objects surety.provider_objects [];
    v_new surety.facts [];
    v_ids text [];
    v_first_payment text;
    v_last_payment text;
    v_derived surety.derived [];
    v_types text [];
begin
    with given as (
        select
            f.*, e.fact,
            surety.match_fact(
                f.payment_id, f.provider, f.account, f.object_id, f.intent, f.data ->> 'source', f.metadata_payment
            ) as matched
        from jsonb_array_elements(p_facts) as e (fact)
        cross join lateral jsonb_to_record(e.fact) as f (
            payment_id text, provider text, account text, livemode boolean, object_id text, kind text, revision integer,
            amount_minor bigint, currency text, intent text, metadata_payment text, objects jsonb, data jsonb,
            source text, source_id text, occurred_at timestamptz
        )
    )
    select
        array_agg(surety.new_fact(
            p_id => surety.new_id('fct', v_now), p_payment_id => g.matched, p_provider => g.provider,
            p_account => g.account, p_livemode => g.livemode, p_object_id => g.object_id, p_kind => g.kind,
            p_revision => coalesce(g.revision, 0), p_amount_minor => g.amount_minor, p_currency => g.currency,
            p_data => coalesce(g.data, '{}'), p_source => g.source, p_source_id => g.source_id,
            p_occurred_at => g.occurred_at, p_recorded_at => v_now
        ) order by g.provider, g.account, g.livemode, g.object_id, g.kind, g.revision, not g.data ? 'card')
            filter (where g.matched is not null),
        array_agg(g.fact) filter (where g.matched is null),
        (
            select array_agg((n.provider, n.account, o.object_id, n.matched)::surety.provider_objects)
            from given as n
            cross join lateral (
                select n.object_id
                union
                select jsonb_array_elements_text(coalesce(n.objects, '[]'))
            ) as o (object_id)
            where n.matched is not null
        )
    into v_facts, v_unmatched, v_objects
    from given as g;

    if v_unmatched is not null then
        perform surety.store_unmatched_facts(to_jsonb(v_unmatched), v_now);
    end if;
    if v_facts is null then
        perform surety.close_recorded(p_facts, v_now);
        return '{}';
    end if;

    perform surety.link_objects(v_objects);
    with keyed as (
        insert into surety.fact_keys (provider, account, livemode, object_id, kind, revision, fact_id)
        select f.provider, f.account, f.livemode, f.object_id, f.kind, f.revision, f.id
        from unnest(v_facts) as f
        where f.kind <> 'card'
        order by f.provider, f.account, f.livemode, f.object_id, f.kind, f.revision
        on conflict (provider, account, livemode, object_id, kind, revision) do nothing
        returning fact_id
    )
    select
        array_agg(f order by f.payment_id, f.object_id, f.kind)
            filter (where f.id in (select k.fact_id from keyed as k))
    into v_new
    from unnest(v_facts) as f;

    if coalesce(cardinality(v_new), 0) < cardinality(v_facts) then
        perform surety.report_contradicting_facts(v_facts, v_now);
        v_new := v_new || surety.late_cards(v_facts, v_new, v_now);
    end if;
    if v_new is null then
        perform surety.close_recorded(p_facts, v_now);
        return '{}';
    end if;

    select
        array_agg(distinct f.payment_id order by f.payment_id),
        min(f.payment_id collate "C"), max(f.payment_id collate "C")
    into v_ids, v_first_payment, v_last_payment
    from unnest(v_new) as f;
    -- A join, so that only the partitions of these payments are searched; an array as a parameter excludes none. The
    -- bounds exclude partitions before the join begins.
    perform from unnest(v_ids) as known (id)
    join surety.payments as p on p.id = known.id and p.id between v_first_payment and v_last_payment
    order by p.id for update of p;

    v_new := surety.mark_mismatched_facts(v_new, v_now);
    insert into surety.facts select f.* from unnest(v_new) as f;

    perform surety.track_pending_money(v_new);

    v_types := surety.advance_refunds(v_new, p_actor, p_request_id) || surety.advance_disputes(v_new, p_actor);
    v_derived := array(select d from surety.derive_payments(v_ids) as d);
    v_types := v_types || surety.advance_payments(
        v_derived, v_new[1].source, p_actor, p_request_id,
        (select jsonb_object_agg(f.payment_id, f.source) from unnest(v_new) as f));
    v_types := v_types || surety.cancel_duplicate_intents(v_new, v_now);
    v_types := v_types || surety.emit_declined_attempts(v_new);
    v_types := v_types || surety.advance_fraud_warnings(v_new);
    perform surety.post_facts(v_new, v_derived, v_now);
    perform surety.close_recorded(p_facts, v_now);
    return v_types;
end;
$$;

comment on function surety.record_facts(jsonb, text, text) is
'Records an array of facts (their form is at the head of db/sql/payments/facts.sql) and their consequences: states,
refunds, disputes, discrepancies, transfers. Known facts change nothing. Returns the types of the emitted events, so
that the caller can schedule their handlers.';

create or replace function surety.retry_unmatched_facts(p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Money without a payment here is posted to suspense: otherwise the ledger and the provider's balance would differ.
declare
    v_now timestamptz := surety.time_now();
    v_found jsonb;
    v_given_up surety.unmatched_facts [];
    v_types text [] := '{}';
begin
    with due as (
        select k.* from surety.unmatched_facts as k where k.ended_at is null order by k.recorded_at, k.id
        limit p_limit
        for update skip locked
    ),
    judged as (
        select d.*, surety.match_fact(
            null, d.provider, d.account, d.object_id, d.fact ->> 'intent', d.fact -> 'data' ->> 'source',
            d.fact ->> 'metadata_payment') is not null as is_found
        from due as d
    ),
    ended as (
        update surety.unmatched_facts as k
        set ended_at = v_now,
            ended_as = case
                when j.is_found then 'matched'
                when k.fact ->> 'metadata_environment' = (select e.id from surety.environment as e) then 'missing_here'
                else 'foreign'
            end
        from judged as j
        where k.id = j.id and (j.is_found or j.recorded_at < v_now - interval '15 minutes')
        returning k.*
    )
    select
        jsonb_agg(e.fact) filter (where e.ended_as = 'matched'),
        array_agg(e::surety.unmatched_facts) filter (where e.ended_as <> 'matched')
    into v_found, v_given_up from ended as e;

    if v_found is not null then
        v_types := surety.record_facts(v_found, 'system:unmatched_facts');
    end if;
    if v_given_up is not null then
        perform surety.open_discrepancy(
            case when g.kind in ('returned', 'dishonored', 'contested') then 'return_without_entry' else g.ended_as end,
            g.object_id || ':' || g.kind, case g.ended_as when 'missing_here' then 'critical' else 'warning' end,
            format('%s %s belongs to no payment here', g.kind, g.object_id),
            jsonb_build_array(
                surety.differing_value('payment', null, coalesce(g.fact ->> 'metadata_payment', g.object_id)),
                surety.differing_amount('amount', null, (g.fact ->> 'amount_minor')::bigint)),
            null, g.id, v_now, p_currency => g.fact ->> 'currency', p_data => g.fact)
        from unnest(v_given_up) as g
        where g.ended_as = 'missing_here' or g.kind in ('returned', 'dishonored', 'contested')
        order by g.ended_as desc, g.object_id, g.kind;
        -- Another system on the same account is reported once, not with each of its payments: its money is in suspense.
        perform surety.open_discrepancy(
            'foreign', f.provider || '/' || f.account, 'warning',
            format('%s and others belong to no payment here: another system uses the account', f.object_id),
            jsonb_build_array(surety.differing_value('user of the account', 'this system', 'another system')),
            null, f.id, v_now, p_data => f.fact)
        from (
            select distinct on (g.provider, g.account) g.*
            from unnest(v_given_up) as g
            where g.ended_as = 'foreign' and g.kind not in ('returned', 'dishonored', 'contested')
            order by g.provider, g.account, g.object_id
        ) as f;
        perform ledger.post(array_agg(surety.entry_without_payment(
            g.fact, surety.posting_rule(g.provider, 'foreign', false)) order by g.object_id), v_now)
        from unnest(v_given_up) as g where g.kind = 'money'
        having count(*) > 0;
    end if;
    return v_types;
end;
$$;

comment on function surety.retry_unmatched_facts(integer) is
'Matches facts again that found no payment, the oldest first, at most p_limit. After 15 minutes a fact ends as foreign,
or as missing_here, a critical discrepancy, if it carries our environment''s metadata. An account has one discrepancy
for all that is foreign; closed, it stays closed. Returns the types of the events made.';
