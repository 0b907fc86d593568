-- Facts in, consequences out. record_facts is the one way in for whatever a provider tells us about a payment: a call's
-- answer, a webhook, a poll, a bank's file. In whatever order and however often facts come, the end is the same.
--
--   match     to a payment, by its id, the provider's object, the intent it belongs to, or our metadata; else park
--   key       one fact per (provider, account, livemode, object, kind, revision); what is known already changes nothing
--   derive    state and amounts from all facts of the payment
--   step      the canonical path from where it stands to where its facts say it is
--   post      the ledger's transfers for each new cause
--
-- A fact, in the array that record_facts takes:
--   {"payment_id"?, "provider", "account", "livemode", "object_id", "kind", "revision"?, "amount_minor"?, "currency"?,
--    "intent"?, "metadata_payment"?, "metadata_environment"?, "objects"?: [other ids of the payment], "data"?: {},
--    "source", "source_id"?, "occurred_at"?}
-- data of money: category (charge, refund, dispute, payout, …), source, fee, net, available_at, and where the record is
-- in another currency than the payment: other_currency, other_gross, rate. amount_minor is the record's gross, signed,
-- and so is other_gross. What a bank says of ACH has the provider bank: ach_credit, ach_return, refund, refund_failure.
-- A line of the bank's that was matched to a payout, bank_line, is told of the account that paid out.

create or replace function surety.objects_without_facts(p_objects jsonb) returns text[]
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- Of [{"provider", "account", "livemode", "object_id", "kinds": []}] the ids of objects about which none of the
    -- kinds is known yet: what a webhook announces and need not be fetched twice.
    select coalesce(array_agg(asked.object_id), '{}')
    from jsonb_to_recordset(p_objects) as asked (
        provider text, account text, livemode boolean, object_id text, kinds jsonb
    )
    where not exists (
        select from surety.fact_keys
        where
            asked.provider = fact_keys.provider and asked.account = fact_keys.account
            and asked.livemode = fact_keys.livemode and asked.object_id = fact_keys.object_id
            and asked.kinds ? fact_keys.kind
    );
end;

create or replace function surety.next_fact_revision(p_provider text, p_account text, p_livemode boolean, p_object_id
text) returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- One more than the highest that is known of an object; whoever asks holds what keeps others from asking.
    select coalesce(max(fact_keys.revision) + 1, 0) from surety.fact_keys
    where
        fact_keys.provider = p_provider and fact_keys.account = p_account and fact_keys.livemode = p_livemode
        and fact_keys.object_id = p_object_id;
end;

create or replace function surety.next_fetch_number(p_provider text, p_account text, p_livemode boolean, p_object_id
text) returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- Who fetches a dispute should be alone, but may have lost his lock with its connection: if two had one number,
    -- nobody could tell which of them was the last. The sequence may have gone back with a restored dump.
    select greatest(
        nextval('surety.fetch_numbers')::integer,
        surety.next_fact_revision(p_provider, p_account, p_livemode, p_object_id)
    );
end;

comment on function surety.next_fetch_number(text, text, boolean, text) is
'The number of an object''s fetch that begins now, where the last fetch wins: disputes.';

create or replace function surety.cancel_duplicate_intents(p_facts surety.facts[], p_at timestamptz) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- One payment has one intent. Another can't charge, for it is never confirmed; it is told, called off when it is seen
-- (by whoever handles the event), and no discrepancy any more once it is over. The payments are locked. Returns the
-- types of the events made.
declare
    v_orphans surety.facts [];
begin
    select array_agg(f order by f.payment_id, f.object_id) into v_orphans
    from unnest(p_facts) as f join surety.payments as p on p.id = f.payment_id
    where f.kind in ('submitted', 'canceled', 'failed') and f.disregarded is null and f.object_id <> p.provider_id;
    if v_orphans is null then
        return '{}';
    end if;
    perform surety.open_discrepancy(
        'duplicate', f.object_id, f.payment_id, format('%s is a second intent beside %s', f.object_id, p.provider_id),
        to_jsonb(f), false, p_at)
    from unnest(v_orphans) as f join surety.payments as p on p.id = f.payment_id
    where f.kind = 'submitted';
    update surety.discrepancies as d
    set closed_at = p_at, closed_because = 'it is canceled'
    from unnest(v_orphans) as f
    where f.kind in ('canceled', 'failed') and d.kind = 'duplicate' and d.subject = f.object_id and d.closed_at is null;
    perform outbox.emit_event(
        'payment', f.payment_id, 'payment.orphan_found',
        jsonb_build_object('payment_id', f.payment_id, 'object_id', f.object_id, 'reason', 'a second intent'),
        null, null)
    from unnest(v_orphans) as f
    where f.kind = 'submitted' and not exists (
        select from unnest(v_orphans) as over
        where over.object_id = f.object_id and over.kind in ('canceled', 'failed')
    );
    return case when found then array['payment.orphan_found'] else '{}' end;
end;
$$;

create or replace function surety.mark_mismatched_facts(p_facts surety.facts[], p_at timestamptz) returns surety.facts[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- Marks facts that can't be about their payment as it is: another account, mode or currency, or an object made for
-- another amount, which nobody may confirm. Each opens a discrepancy.
declare
    v_judged surety.facts [];
begin
    with judged as (
        select
            f as fact, f.id,
            case
                -- Who carries an ACH payment has accounts of his own.
                when case
                    when f.provider = p.provider then f.account <> p.provider_account else p.rail <> 'ach'
                end then 'account'
                when f.livemode <> p.livemode then 'livemode'
                when f.currency <> p.currency and f.kind not in ('money', 'available') then 'currency'
                when
                    f.kind = 'money' and f.currency <> p.currency
                    and coalesce(f.data ->> 'other_currency', f.currency) <> p.currency then 'currency'
                when f.kind = 'submitted' and f.amount_minor <> p.amount_minor then 'amount'
            end as stranger
        from unnest(p_facts) as f join surety.payments as p on p.id = f.payment_id
    )
    select array_agg((
        (j.fact).id, (j.fact).payment_id, (j.fact).provider, (j.fact).account, (j.fact).livemode, (j.fact).object_id,
        (j.fact).kind, (j.fact).revision, (j.fact).amount_minor, (j.fact).currency, (j.fact).data, (j.fact).source,
        (j.fact).source_id, j.stranger, (j.fact).occurred_at, (j.fact).recorded_at
    )::surety.facts order by (j.fact).payment_id, j.id) into v_judged
    from judged as j;
    perform surety.open_discrepancy(
        f.disregarded, f.object_id || ':' || f.kind, f.payment_id,
        format('%s %s does not fit its payment: %s', f.kind, f.object_id, f.disregarded), to_jsonb(f), true, p_at)
    from unnest(v_judged) as f where f.disregarded is not null;
    return v_judged;
end;
$$;

create or replace function surety.report_contradicting_facts(p_facts surety.facts[], p_at timestamptz) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    -- The same object with another amount, currency or payment is a contradiction, whoever says it. What is known may
    -- be in the same array: the first of its key.
    select surety.open_discrepancy(
        case
            when known.id is null then 'duplicate'
            when f.currency is distinct from known.currency then 'currency'
            else 'amount'
        end,
        f.object_id || ':' || f.kind, f.payment_id,
        case
            when known.id is null then format('%s %s was told of another payment', f.kind, f.object_id)
            else format(
                '%s %s was told with %s %s, now with %s %s',
                f.kind, f.object_id, known.amount_minor, known.currency, f.amount_minor, f.currency
            )
        end,
        jsonb_build_object('received', to_jsonb(f), 'known', keys.fact_id), true, p_at
    )
    from unnest(p_facts) as f
    inner join surety.fact_keys as keys
        on
            f.provider = keys.provider and f.account = keys.account and f.livemode = keys.livemode
            and f.object_id = keys.object_id and f.kind = keys.kind and f.revision = keys.revision
    left join lateral (
        select
            stored.id,
            stored.amount_minor,
            stored.currency
        from surety.facts as stored
        where keys.fact_id = stored.id and f.payment_id = stored.payment_id
        union all
        select
            told.id,
            told.amount_minor,
            told.currency
        from unnest(p_facts) as told
        where keys.fact_id = told.id and f.payment_id = told.payment_id
    ) as known on true
    where
        keys.fact_id <> f.id
        and (
            known.id is null
            or f.amount_minor is distinct from known.amount_minor or f.currency is distinct from known.currency
        )
    order by f.object_id, f.kind, f.id;
end;

create or replace function surety.record_facts(p_facts jsonb, p_actor text, p_request_id text default null)
returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Returns the types of the events that it made, to wake who handles them. Locks facts, payments, refunds, accounts,
-- each sorted.
declare
    v_now timestamptz := surety.time_now();
    v_facts surety.facts [];
    v_unmatched jsonb [];
    v_objects surety.provider_objects [];
    v_new surety.facts [];
    v_ids text [];
    v_derived surety.derived [];
    v_types text [];
    v_declined text [];
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
        array_agg((
            surety.new_id('fct', v_now), g.matched, g.provider, g.account, g.livemode, g.object_id, g.kind,
            coalesce(g.revision, 0), g.amount_minor, g.currency, coalesce(g.data, '{}'), g.source, g.source_id, null,
            g.occurred_at, v_now
        )::surety.facts order by g.provider, g.account, g.livemode, g.object_id, g.kind, g.revision)
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
        return '{}';
    end if;

    insert into surety.provider_objects (provider, account, object_id, payment_id)
    select distinct on (o.provider, o.account, o.object_id) o.provider, o.account, o.object_id, o.payment_id
    from unnest(v_objects) as o
    where not exists (
        select from surety.provider_objects as k
        where k.provider = o.provider and k.account = o.account and k.object_id = o.object_id
    )
    order by o.provider, o.account, o.object_id
    on conflict (provider, account, object_id) do nothing;

    with keyed as (
        insert into surety.fact_keys (provider, account, livemode, object_id, kind, revision, fact_id)
        select f.provider, f.account, f.livemode, f.object_id, f.kind, f.revision, f.id
        from unnest(v_facts) as f
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
    end if;
    if v_new is null then
        return '{}';
    end if;

    select array_agg(distinct f.payment_id order by f.payment_id) into v_ids from unnest(v_new) as f;
    perform from surety.payments as p where p.id = any(v_ids) order by p.id for update;

    v_new := surety.mark_mismatched_facts(v_new, v_now);
    insert into surety.facts select f.* from unnest(v_new) as f;

    insert into surety.pending_money (provider, account, object_id, created_at, available_at)
    select f.provider, f.account, f.object_id, f.occurred_at, (f.data ->> 'available_at')::timestamptz
    from unnest(v_new) as f
    where f.kind = 'money' and f.data ? 'available_at' and not exists (
        select from surety.fact_keys as k
        where k.provider = f.provider and k.account = f.account and k.livemode = f.livemode
            and k.object_id = f.object_id and k.kind = 'available' and k.revision = 0
    )
    order by f.provider, f.account, f.object_id
    on conflict (provider, account, object_id) do nothing;
    delete from surety.pending_money as m
    using unnest(v_new) as f
    where f.kind = 'available' and m.provider = f.provider and m.account = f.account and m.object_id = f.object_id;

    v_types := surety.advance_refunds(v_new, p_actor, p_request_id) || surety.advance_disputes(v_new, p_actor);
    v_derived := array(select d from surety.derive_payments(v_ids) as d);
    v_types := v_types || surety.advance_payments(v_derived, v_new[1].source, p_actor, p_request_id);

    v_types := v_types || surety.cancel_duplicate_intents(v_new, v_now);

    -- A decline leaves the intent alive; it must be called off before the payment has failed.
    select array_agg(distinct f.payment_id) into v_declined
    from unnest(v_new) as f
    join surety.payments as p on p.id = f.payment_id
    join surety.states as s on s.state = p.state
    where f.kind = 'attempt_failed' and f.object_id = p.provider_id and f.disregarded is null and not s.is_final
        and p.captured_minor = 0;
    if v_declined is not null then
        perform outbox.emit_event(
            'payment', p.id, 'payment.attempt_failed',
            jsonb_build_object('payment_id', p.id, 'reason', 'declined'), null, p.version)
        from surety.payments as p where p.id = any(v_declined);
        v_types := v_types || 'payment.attempt_failed'::text;
    end if;

    perform surety.post_facts(v_new, v_derived, v_now);
    return v_types;
end;
$$;

create or replace function surety.retry_unmatched_facts(p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Facts that found no payment are tried again; after 15 minutes they are foreign, or a critical discrepancy when they
-- carry our environment's metadata. Foreign money is booked to suspense, else payouts would never tie.
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
        array_agg((
            e.id, e.provider, e.account, e.livemode, e.object_id, e.kind, e.revision, e.fact, e.recorded_at,
            e.ended_at, e.ended_as
        )::surety.unmatched_facts) filter (where e.ended_as <> 'matched')
    into v_found, v_given_up from ended as e;

    if v_found is not null then
        v_types := surety.record_facts(v_found, 'system:unmatched_facts');
    end if;
    if v_given_up is not null then
        perform surety.open_discrepancy(
            case when g.kind in ('returned', 'dishonored', 'contested') then 'return_without_entry' else g.ended_as end,
            g.object_id || ':' || g.kind, null,
            format('%s %s belongs to no payment here', g.kind, g.object_id), g.fact, g.ended_as = 'missing_here', v_now)
        from unnest(v_given_up) as g;
        perform ledger.post(array_agg(surety.entry_without_payment(
            g.fact, surety.posting_rule(g.provider, 'foreign', false)) order by g.object_id), v_now)
        from unnest(v_given_up) as g where g.kind = 'money'
        having count(*) > 0;
    end if;
    return v_types;
end;
$$;
