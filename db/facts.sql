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
-- in another currency than the payment: other_currency, other_gross, rate. amount_minor is the record's gross, signed.

create or replace function surety.match_fact(
    p_payment_id text, p_provider text, p_account text, p_object_id text, p_intent text, p_source_object text,
    p_metadata_payment text
) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(
        p_payment_id,
        (
            select o.payment_id
            from surety.provider_objects as o
            where (o.provider, o.account, o.object_id) = (p_provider, p_account, p_object_id)
        ),
        (
            select o.payment_id
            from surety.provider_objects as o
            where (o.provider, o.account, o.object_id) = (p_provider, p_account, p_intent)
        ),
        (
            select o.payment_id
            from surety.provider_objects as o
            where (o.provider, o.account, o.object_id) = (p_provider, p_account, p_source_object)
        ),
        (select p.id from surety.payments as p where p.id = p_metadata_payment)
    );
end;

create or replace function surety.record_facts(p_facts jsonb, p_actor text, p_request_id text default null)
returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Returns the types of the events that it made, to wake who handles them. Locks facts, payments, accounts, each sorted.
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
        perform surety.park_facts(to_jsonb(v_unmatched), v_now);
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
    select array_agg(f order by f.payment_id, f.object_id, f.kind) filter (where f.id in (select k.fact_id from keyed as k))
    into v_new
    from unnest(v_facts) as f;

    if coalesce(cardinality(v_new), 0) < cardinality(v_facts) then
        perform surety.compare_with_known(v_facts, v_now);
    end if;
    if v_new is null then
        return '{}';
    end if;

    select array_agg(distinct f.payment_id order by f.payment_id) into v_ids from unnest(v_new) as f;
    perform from surety.payments as p where p.id = any(v_ids) order by p.id for update;

    v_new := surety.disregard_strangers(v_new, v_now);
    insert into surety.facts select f.* from unnest(v_new) as f;

    insert into surety.pending_money (provider, account, object_id, created_at, available_at)
    select f.provider, f.account, f.object_id, f.occurred_at, (f.data ->> 'available_at')::timestamptz
    from unnest(v_new) as f
    where f.kind = 'money' and not exists (
        select from surety.fact_keys as k
        where k.provider = f.provider and k.account = f.account and k.livemode = f.livemode
            and k.object_id = f.object_id and k.kind = 'available' and k.revision = 0
    )
    order by f.provider, f.account, f.object_id
    on conflict (provider, account, object_id) do nothing;
    delete from surety.pending_money as m
    using unnest(v_new) as f
    where f.kind = 'available' and m.provider = f.provider and m.account = f.account and m.object_id = f.object_id;

    v_derived := array(select d from surety.derive(v_ids) as d);
    v_types := surety.advance(v_derived, v_new[1].source, p_actor, p_request_id);

    -- One payment has one intent; another can't charge, for it is never confirmed, but somebody should cancel it.
    perform surety.open_discrepancy(
        'duplicate', f.object_id, f.payment_id, format('%s is a second intent beside %s', f.object_id, p.provider_id),
        to_jsonb(f), false, v_now)
    from unnest(v_new) as f join surety.payments as p on p.id = f.payment_id
    where f.kind = 'submitted' and f.disregarded is null and f.object_id <> p.provider_id;

    -- A decline leaves the intent alive; it must be called off before the payment has failed.
    select array_agg(distinct f.payment_id) into v_declined
    from unnest(v_new) as f join surety.payments as p on p.id = f.payment_id join surety.states as s on s.state = p.state
    where f.kind = 'attempt_failed' and f.object_id = p.provider_id and f.disregarded is null and not s.is_final
        and p.captured_minor = 0;
    if v_declined is not null then
        perform outbox.emit(
            'payment', p.id, 'payment.attempt_failed',
            jsonb_build_object('payment_id', p.id, 'reason', 'declined'), null, p.version)
        from surety.payments as p where p.id = any(v_declined);
        v_types := v_types || 'payment.attempt_failed'::text;
    end if;

    perform surety.post_facts(v_new, v_derived, v_now);
    return v_types;
end;
$$;

create or replace function surety.open_discrepancy(
    p_kind text, p_subject text, p_payment_id text, p_detail text, p_data jsonb, p_is_critical boolean, p_at timestamptz
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.discrepancies (id, kind, subject, payment_id, detail, data, is_critical, opened_at)
    select surety.new_id('dis', p_at), p_kind, p_subject, p_payment_id, p_detail, p_data, p_is_critical, p_at
    on conflict (kind, subject) do nothing;
end;

create or replace function surety.disregard_strangers(p_facts surety.facts[], p_at timestamptz) returns surety.facts[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- Marks facts that can't be about their payment as it is: another account, mode or currency. Each opens a discrepancy.
declare
    v_judged surety.facts [];
begin
    with judged as (
        select
            f as fact, f.id,
            case
                when f.account <> p.provider_account then 'account'
                when f.livemode <> p.livemode then 'livemode'
                when f.currency <> p.currency and f.kind not in ('money', 'available') then 'currency'
                when
                    f.kind = 'money' and f.currency <> p.currency
                    and coalesce(f.data ->> 'other_currency', f.currency) <> p.currency then 'currency'
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

create or replace function surety.compare_with_known(p_facts surety.facts[], p_at timestamptz) returns void
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
        jsonb_build_object('told', to_jsonb(f), 'known', keys.fact_id), true, p_at
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

create or replace function surety.advance(p_derived surety.derived[], p_cause text, p_actor text, p_request_id text)
returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Brings amounts and state of payments, already locked, to what their facts say: by way of the mandatory steps not yet
-- made, then by one direct step. Returns the types of the events made.
declare
    v_now timestamptz := surety.time_now();
    v_types text [];
begin
    with targets as materialized (
        select
            d.*, p.id, p.version, p.state, p.rail, p.capture_method,
            d.captured_minor > 0 as is_captured,
            p.state in ('failed', 'canceled') as has_ended,
            d.refunded_minor <> p.refunded_minor as is_refunded_otherwise,
            array(select s.to_state from surety.steps as s where s.payment_id = p.id) as visited,
            array[p.captured_minor, p.refunded_minor, p.refund_pending_minor, p.at_risk_minor, p.reversed_minor]
            = array[d.captured_minor, d.refunded_minor, d.refund_pending_minor, d.at_risk_minor, d.reversed_minor]
            and p.provider_id is not distinct from d.provider_id
            and (p.next_action is not distinct from d.next_action or d.target_state <> 'requires_action')
            and p.failure is not distinct from d.failure as is_same
        from unnest(p_derived) as d join surety.payments as p on p.id = d.payment_id
    ),
    path as materialized (
        select
            t.id, t.version, t.state as from_first, t.evidenced, t.is_settled, t.target_state,
            way.position, way.state, row_number() over w as n, lag(way.state, 1, t.state) over w as from_state,
            t.is_same, t.captured_minor, t.refunded_minor, t.refund_pending_minor, t.at_risk_minor, t.reversed_minor,
            t.provider_id, t.next_action, t.failure
        from targets as t
        left join lateral (
            -- What the mandatory path demands up to the target and was never visited …
            select m.position, m.state
            from surety.mandatory_steps as m
            where m.rail = t.rail and m.capture_method = t.capture_method and m.state <> all(t.visited)
                and case
                    -- What ended once and succeeded after all goes on from confirmed, whatever it had left out before.
                    when t.is_captured and t.visited && array['failed', 'canceled']
                        then m.position = 5 or (m.position = 6 and t.is_settled)
                    when t.is_captured then m.position <= 5 or t.is_settled
                    else (m.position <= 3 or m.state = t.target_state) and not t.has_ended
                end
            union all
            -- … a lost dispute was a dispute …
            select 90, 'disputed'
            where t.target_state = 'reversed' and t.is_lost and t.state not in ('disputed', 'reversed')
            union all
            -- … and the target itself, unless it is where we stand or one of the above.
            select 99, t.target_state
            where (t.is_captured or not t.has_ended)
                and (
                    t.target_state <> t.state
                    or t.target_state = 'partially_refunded' and t.is_refunded_otherwise
                    or t.is_settled and t.target_state <> 'settled' and 'settled' <> all(t.visited)
                )
                and not exists (
                    select from surety.mandatory_steps as m
                    where m.rail = t.rail and m.capture_method = t.capture_method and m.state = t.target_state
                        and m.state <> all(t.visited)
                )
        ) as way on true
        window w as (partition by t.id order by way.position)
    ),
    walked as (
        insert into surety.steps (payment_id, version, from_state, to_state, cause, implied, at, actor, request_id)
        select
            path.id, path.version + path.n::integer, path.from_state, path.state, p_cause,
            path.state <> path.target_state and path.state <> all(coalesce(path.evidenced, '{}'))
            and not (path.state = 'settled' and path.is_settled),
            v_now, p_actor, p_request_id
        from path where path.state is not null
        order by path.id, path.position
        returning to_state
    ),
    -- State and amounts in one update: the steps' trigger finds the projection already made.
    changed as (
        update surety.payments as p
        set version = t.version + case when t.state is null then 0 else t.n::integer end,
            state = coalesce(t.state, p.state),
            captured_minor = t.captured_minor, refunded_minor = t.refunded_minor,
            refund_pending_minor = t.refund_pending_minor, at_risk_minor = t.at_risk_minor,
            reversed_minor = t.reversed_minor, provider_id = coalesce(t.provider_id, p.provider_id),
            next_action = case when coalesce(t.state, p.state) = 'requires_action' then t.next_action end,
            -- Why the provider refused it is no fact, and stays true of what has failed.
            failure = case
                when p.state = 'failed' and t.captured_minor = 0 then coalesce(t.failure, p.failure) else t.failure
            end,
            updated_at = v_now,
            ask_at = case when t.state is null then p.ask_at else v_now + s.ask_after end,
            asked = case when t.state is null then p.asked else 0 end
        from (select distinct on (path.id) path.* from path order by path.id, path.position desc) as t
        left join surety.states as s on s.state = t.state
        where p.id = t.id and (not t.is_same or t.state is not null)
    ),
    orphans as (
        -- We ended it, and the provider holds something live or ended it otherwise: never a step, always somebody's
        -- business.
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, opened_at)
        select
            surety.new_id('dis', v_now), 'state', t.id, t.id,
            format('%s here, %s at the provider', t.state, t.target_state), v_now
        from targets as t
        where t.has_ended and not t.is_captured and t.target_state not in (t.state, 'provider_submitted')
        on conflict (kind, subject) do nothing
    ),
    excesses as (
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, data, is_critical, opened_at)
        select
            surety.new_id('dis', v_now), 'amount', d.payment_id, d.payment_id,
            case
                when d.excess_minor > 0 then format('%s more was captured than was asked for', d.excess_minor)
                else format('%s more was refunded than was captured', d.over_refunded_minor)
            end,
            '{}', true, v_now
        from unnest(p_derived) as d
        where d.excess_minor > 0 or d.over_refunded_minor > 0
        on conflict (kind, subject) do nothing
    )
    select array_agg(distinct 'payment.' || w.to_state) into v_types from walked as w;
    return coalesce(v_types, '{}');
end;
$$;

create or replace function surety.post_facts(p_facts surety.facts[], p_derived surety.derived[], p_at timestamptz)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- The ledger's consequences of new facts. Status moves merchants' balances; only balance transactions move the
-- provider's.
declare
    v_entries ledger.entry [];
begin
    with facts as (
        select
            f.object_id, f.kind, f.revision, f.amount_minor, f.currency, f.data, p.id as payment_id, p.merchant_id,
            p.amount_minor as asked_minor, p.currency as payment_currency,
            f.provider || '/' || f.account as provider_owner, m.fee_basis_points, m.fee_fixed_minor
        from unnest(p_facts) as f
        join surety.payments as p on p.id = f.payment_id
        join surety.merchants as m on m.id = p.merchant_id
        where f.disregarded is null
    ),
    causes as (
        select
            f.object_id || ':captured' as cause, 'captured' as rule, f.payment_id, f.merchant_id, f.provider_owner,
            f.currency, least(f.amount_minor, f.asked_minor) as gross, null::bigint as fee, null::bigint as net,
            ledger.fee(least(f.amount_minor, f.asked_minor), f.fee_basis_points, f.fee_fixed_minor) as ours,
            greatest(0, f.amount_minor - f.asked_minor) as excess,
            null::text as other_currency, null::bigint as other_gross, null::bigint as other_net
        from facts as f where f.kind = 'captured'
        union all
        select
            f.object_id, r.rule, f.payment_id, f.merchant_id, f.provider_owner, f.currency, f.amount_minor,
            (f.data ->> 'fee')::bigint, (f.data ->> 'net')::bigint, null, null,
            f.data ->> 'other_currency', (f.data ->> 'other_gross')::bigint, null
        from facts as f
        cross join lateral (
            select surety.money_rule(f.data ->> 'category', f.data ? 'other_currency') as rule
        ) as r
        where f.kind = 'money'
        union all
        -- Any news of a refund means that it was asked for.
        select
            f.object_id || ':asked', 'refund_asked', f.payment_id, f.merchant_id, f.provider_owner, f.currency,
            f.amount_minor, null, null, null, null, null, null, null
        from facts as f where f.kind like 'refund\_%'
        union all
        select
            f.object_id || ':failed', 'refund_failed', f.payment_id, f.merchant_id, f.provider_owner, f.currency,
            f.amount_minor, null, null, null, null, null, null, null
        from facts as f where f.kind in ('refund_failed', 'refund_canceled')
        union all
        select
            f.object_id || ':' || moved.n || ':' || moved.rule, moved.rule, f.payment_id, f.merchant_id, f.provider_owner,
            f.currency, f.amount_minor, null, null, null, null, null, null, null
        from (
            select distinct on (g.object_id) g.* from facts as g where g.kind like 'dispute\_%'
            order by g.object_id, g.revision desc
        ) as f
        cross join lateral surety.dispute_moves(f.payment_id, f.object_id) as moved
        union all
        select
            d.payment_id || ':settled',
            case when s.exchanged then 'settled_exchanged' else 'settled' end,
            p.id, p.merchant_id, p.provider || '/' || p.provider_account, s.currency,
            null, null, s.net, null, null, s.other_currency, null, s.other_net
        from unnest(p_derived) as d
        join surety.payments as p on p.id = d.payment_id
        join surety.merchants as m on m.id = p.merchant_id
        cross join lateral surety.settled_amounts(p, m) as s
        where d.is_settled
        union all
        -- Money that can't be this payment's arrived all the same. That of the other mode is none.
        select
            f.object_id, 'foreign', f.payment_id, null, f.provider || '/' || f.account, f.currency, f.amount_minor,
            (f.data ->> 'fee')::bigint, (f.data ->> 'net')::bigint, null, null, null, null, null
        from unnest(p_facts) as f
        where f.kind = 'money' and f.disregarded in ('currency', 'account')
    )
    select array_agg((
        c.cause, c.rule, c.payment_id, c.merchant_id, c.provider_owner, c.currency, c.gross, c.fee, c.net, c.ours,
        c.excess, c.other_currency, c.other_gross, c.other_net
    )::ledger.entry order by c.cause) into v_entries
    from causes as c;
    perform surety.open_discrepancy(
        'category', f.object_id, f.payment_id, format('a balance transaction of category %s', f.data ->> 'category'),
        to_jsonb(f), false, p_at)
    from unnest(p_facts) as f
    where f.kind = 'money' and f.disregarded is null
        and surety.money_rule(f.data ->> 'category', false) = 'foreign';
    if v_entries is not null then
        perform ledger.post(v_entries, p_at);
    end if;
end;
$$;

create or replace function surety.money_rule(p_category text, p_is_exchanged boolean) returns text
language sql immutable parallel safe
begin atomic
    -- Whatever we have no rule for goes to suspense, so that no money stays unbooked.
    select case
        when p_category in ('charge', 'partial_capture_reversal') and p_is_exchanged then 'charge_exchanged'
        when p_category in ('charge', 'partial_capture_reversal') then 'charge'
        when p_category in ('refund', 'refund_failure', 'dispute', 'dispute_reversal', 'payout', 'payout_reversal')
            then p_category
        when p_category in ('fee', 'tax', 'network_cost') then 'provider_fee'
        when p_category = 'risk_reserved_funds' then 'reserve'
        else 'foreign'
    end;
end;

create or replace function surety.settled_amounts(p_payment surety.payments, p_merchant surety.merchants)
returns table (exchanged boolean, currency text, net bigint, other_currency text, other_net bigint)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- What the merchant is owed after our fee, in the currency that arrived. The fee is the one that was taken, if the
    -- capture has posted, for the merchant's may be another by now.
    with owed as (
        select
            p_payment.captured_minor - coalesce(
                (
                    select coalesce(sum(transfers.amount_minor), 0)
                    from ledger.postings
                    left join ledger.transfers
                        on postings.id = transfers.posting_id and transfers.credit_account like 'rev:%'
                    where postings.payment_id = p_payment.id and postings.rule = 'captured'
                    group by postings.payment_id
                ),
                ledger.fee(p_payment.captured_minor, p_merchant.fee_basis_points, p_merchant.fee_fixed_minor)
            )::bigint as net,
            (
                select facts.data || jsonb_build_object('currency', facts.currency) from surety.facts
                where facts.payment_id = p_payment.id and facts.kind = 'money' and facts.data ? 'other_currency'
                    and facts.disregarded is null
                order by facts.id limit 1
            ) as exchange
    )

    select
        owed.exchange is not null,
        coalesce(owed.exchange ->> 'currency', p_payment.currency),
        case
            when owed.exchange is null then owed.net else round(owed.net * (owed.exchange ->> 'rate')::numeric)::bigint
        end,
        p_payment.currency,
        owed.net
    from owed;
end;

create or replace function surety.dispute_moves(p_payment_id text, p_object_id text)
returns table (n bigint, rule text)
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
-- What must be posted so that the merchant's balances stand as the dispute's last fetch says. A dispute can go back and
-- forth (lost, appealed, won), so this looks at what was posted last.
declare
    v_count bigint;
    v_last text;
    v_now text;
begin
    select f.kind into v_now
    from surety.facts as f
    where f.payment_id = p_payment_id and f.object_id = p_object_id and f.kind like 'dispute\_%' and f.disregarded is null
    order by f.revision desc limit 1;
    select count(*), (array_agg(p.rule order by split_part(p.cause, ':', 2)::bigint desc))[1] into v_count, v_last
    from ledger.postings as p
    where p.payment_id = p_payment_id and p.cause like p_object_id || ':%' and p.rule like 'dispute\_%';
    return query
    select v_count + s.ordinality, s.step
    from unnest(case
        when coalesce(v_last, 'none') in ('none', 'dispute_won', 'dispute_reinstated') then case v_now
            when 'dispute_opened' then array['dispute_opened']
            when 'dispute_lost' then array['dispute_opened', 'dispute_lost']
            when 'dispute_won' then case when v_last is null then array['dispute_opened', 'dispute_won'] end
        end
        when v_last in ('dispute_opened', 'dispute_appealed') then case v_now
            when 'dispute_won' then array['dispute_won']
            when 'dispute_lost' then array['dispute_lost']
        end
        when v_last = 'dispute_lost' then case v_now
            when 'dispute_won' then array['dispute_reinstated']
            when 'dispute_opened' then array['dispute_appealed']
        end
    end) with ordinality as s (step, ordinality);
end;
$$;

create or replace function surety.park_facts(p_facts jsonb, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- Facts without a payment. Payouts and the provider's own fees have none by nature and are booked at once.
declare
    v_entries ledger.entry [];
begin
    with parked as (
        insert into surety.parked_facts (
            id, provider, account, livemode, object_id, kind, revision, fact, parked_at, ended_at, ended_as
        )
        select
            surety.new_id('prk', p_at), f.fact ->> 'provider', f.fact ->> 'account', (f.fact ->> 'livemode')::boolean,
            f.fact ->> 'object_id', f.fact ->> 'kind', coalesce((f.fact ->> 'revision')::integer, 0), f.fact, p_at,
            case when k.is_unattached then p_at end, case when k.is_unattached then 'unattached' end
        from jsonb_array_elements(p_facts) as f (fact)
        cross join lateral (select surety.is_unattached(f.fact) as is_unattached) as k
        order by 2, 3, 4, 5, 6, 7
        on conflict (provider, account, livemode, object_id, kind, revision) do nothing
        returning *
    )
    select array_agg(surety.unattached_entry(
        k.fact, surety.money_rule(k.fact -> 'data' ->> 'category', false)) order by k.object_id)
    into v_entries
    from parked as k where k.ended_as = 'unattached' and k.kind = 'money';
    if v_entries is not null then
        perform ledger.post(v_entries, p_at);
    end if;
end;
$$;

create or replace function surety.is_unattached(p_fact jsonb) returns boolean
language sql immutable parallel safe
begin atomic
    select coalesce(
        p_fact ->> 'kind' in ('payout', 'payout_failed')
        or p_fact -> 'data' ->> 'category' in (
            'payout', 'payout_reversal', 'fee', 'tax', 'network_cost', 'risk_reserved_funds'
        ),
        false
    );
end;

create or replace function surety.unattached_entry(p_fact jsonb, p_rule text) returns ledger.entry
language sql immutable parallel safe
begin atomic
    select (
        p_fact ->> 'object_id', p_rule, null, null, (p_fact ->> 'provider') || '/' || (p_fact ->> 'account'),
        p_fact ->> 'currency', (p_fact ->> 'amount_minor')::bigint, (p_fact -> 'data' ->> 'fee')::bigint,
        (p_fact -> 'data' ->> 'net')::bigint, null, null, null, null, null
    )::ledger.entry;
end;

create or replace function surety.retry_parked(p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Facts that found no payment are tried again; after 15 minutes they are foreign, or a critical discrepancy when they
-- carry our environment's metadata. Foreign money is booked to suspense, else payouts would never tie.
declare
    v_now timestamptz := surety.time_now();
    v_found jsonb;
    v_given_up surety.parked_facts [];
    v_types text [] := '{}';
begin
    with due as (
        select k.* from surety.parked_facts as k where k.ended_at is null order by k.parked_at, k.id
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
        update surety.parked_facts as k
        set ended_at = v_now,
            ended_as = case
                when j.is_found then 'attached'
                when k.fact ->> 'metadata_environment' = (select e.id from surety.environment as e) then 'missing_here'
                else 'foreign'
            end
        from judged as j
        where k.id = j.id and (j.is_found or j.parked_at < v_now - interval '15 minutes')
        returning k.*
    )
    select
        jsonb_agg(e.fact) filter (where e.ended_as = 'attached'),
        array_agg((
            e.id, e.provider, e.account, e.livemode, e.object_id, e.kind, e.revision, e.fact, e.parked_at, e.ended_at, e.ended_as
        )::surety.parked_facts) filter (where e.ended_as <> 'attached')
    into v_found, v_given_up from ended as e;

    if v_found is not null then
        v_types := surety.record_facts(v_found, 'system:parked');
    end if;
    if v_given_up is not null then
        perform surety.open_discrepancy(
            g.ended_as, g.object_id || ':' || g.kind, null,
            format('%s %s belongs to no payment here', g.kind, g.object_id), g.fact, g.ended_as = 'missing_here', v_now)
        from unnest(v_given_up) as g;
        perform ledger.post(array_agg(surety.unattached_entry(g.fact, 'foreign') order by g.object_id), v_now)
        from unnest(v_given_up) as g where g.kind = 'money'
        having count(*) > 0;
    end if;
    return v_types;
end;
$$;
