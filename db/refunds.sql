-- Refunds: a merchant asks for one and the amount is taken up at once; the provider makes it. Or it was made there.
--
--   ask       api.create_refund: money out is reserved in the transaction that asks for it
--   send      surety.begin_refunds: what will be sent is committed first; surety.refuse_refunds if it is not taken
--   advance   surety.advance_refunds: what facts say of refunds, as rows and steps
--   project   a trigger: the refund's row, its event, its audit entry
--   ask about  the sweep: surety.claim_refund_questions
--   read      api.get_refund, api.list_refunds

create or replace function api.show_refund(r surety.refunds) returns table (document json)
language sql stable parallel safe
begin atomic
    -- The refund as merchants see it; columns in the order of the document.
    select row_to_json(shown.*) from (
        select
            r.id as id,
            'refund' as object,
            r.state as state,
            r.version as version,
            r.payment_id as payment,
            r.amount_minor as amount,
            r.currency as currency,
            r.reason as reason,
            r.failure as failure,
            case when r.provider_id is not null then json_build_object('name', r.provider, 'id', r.provider_id) end
                as provider,
            r.metadata as metadata,
            surety.iso(r.created_at) as created_at,
            surety.iso(r.updated_at) as updated_at
    ) as shown;
end;

create or replace function surety.project_refund_steps() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_epoch integer := outbox.epoch();
begin
    update surety.refunds as r
    set version = last.version, state = last.to_state, updated_at = last.at, ask_at = last.at + s.ask_after, asked = 0
    from (
        select distinct on (n.refund_id) n.refund_id, n.version, n.to_state, n.at
        from new_steps as n
        order by n.refund_id, n.version desc
    ) as last
    join surety.refund_states as s on s.state = last.to_state
    where r.id = last.refund_id;

    insert into outbox.events (id, aggregate_type, aggregate_id, type, payload, merchant_id, version, epoch)
    select
        surety.new_id('evt', v_now), 'refund', n.refund_id, 'refund.' || n.to_state,
        jsonb_strip_nulls(jsonb_build_object(
            'payment_id', r.payment_id, 'refund_id', r.id, 'state', n.to_state, 'version', n.version,
            'at', surety.iso(n.at), 'amount', r.amount_minor, 'provider_id', r.provider_id,
            'failure', case when n.to_state in ('failed', 'canceled') then r.failure end)),
        r.merchant_id, n.version, v_epoch
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

create or replace function api.create_refund(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- {…, "payment_id", "amount"?, "reason"?, "metadata"?}: 201 and the refund, pending; without an amount, all
-- that is left.
-- 404 not-found   409 wrong-state, detail {state}   400 invalid-request: more than is left
-- 409 balance-too-low, detail {needed, balance, currency}: the merchant's money, settled or not, must cover it; our fee
-- for this very payment may be overdrawn, so that who has nothing else can still give all of it back. What arrived in
-- another currency is worth, here and in balance, what it was at the payment's own rate.
declare
    v_admitted api.admission := api.admit('POST /v1/payments/{id}/refunds', p_request);
    v_now timestamptz := v_admitted.admitted_at;
    v_payment surety.payments;
    v_refund surety.refunds;
    v_left bigint;
    v_amount bigint;
    v_exchange record;
    v_accounts text [];
    v_balance bigint;
    v_other bigint;
    v_fee bigint;
begin
    if (v_admitted.outcome).status is not null then
        return v_admitted.outcome;
    end if;
    select p.* into v_payment from surety.payments as p
    where p.id = p_request ->> 'payment_id' and p.merchant_id = v_admitted.merchant_id
    for update;
    if not found then
        return api.refuse(v_admitted, 404, 'not-found', null);
    end if;
    v_left := v_payment.captured_minor - v_payment.refunded_minor - v_payment.refund_pending_minor
        - v_payment.at_risk_minor - v_payment.reversed_minor;
    if v_payment.state not in ('confirmed', 'settled', 'partially_refunded') or v_left <= 0 then
        return api.refuse(v_admitted, 409, 'wrong-state', jsonb_build_object(
            'state', v_payment.state,
            'reason', case when v_payment.state in ('confirmed', 'settled', 'partially_refunded')
                then 'all of it is refunded or being refunded' end));
    end if;
    v_amount := coalesce((p_request ->> 'amount')::bigint, v_left);
    if v_amount not between 1 and v_left then
        return api.refuse(v_admitted, 400, 'invalid-request', jsonb_build_object(
            'field', '/amount', 'rule', case when v_amount < 1 then 'minimum' else 'maximum' end,
            'limit', case when v_amount < 1 then 1 else v_left end, 'given', v_amount, 'currency', v_payment.currency));
    end if;

    select e.currency, e.rate into v_exchange from surety.exchange_of(v_payment.id) as e;
    v_accounts := array(
        select a.kind || ':' || v_payment.merchant_id || ':' || c.currency
        from unnest(array['avail', 'pend']) as a (kind)
        cross join unnest(array[v_payment.currency, v_exchange.currency]) as c (currency)
        where c.currency is not null
    );
    perform from ledger.balances as b where b.account_id = any(v_accounts) order by b.account_id for update;
    select
        coalesce(sum(b.balance_minor) filter (where a.currency = v_payment.currency), 0),
        coalesce(sum(b.balance_minor) filter (where a.currency <> v_payment.currency), 0)
    into v_balance, v_other
    from ledger.balances as b join ledger.accounts as a on a.id = b.account_id
    where b.account_id = any(v_accounts);
    select coalesce(sum(t.amount_minor), 0) into v_fee
    from ledger.postings as g join ledger.transfers as t on t.posting_id = g.id
    where g.payment_id = v_payment.id and g.rule in ('captured', 'captured_ach') and t.credit_account like 'rev:%';
    -- Rounded as it was when it settled, else who has nothing else could lack a cent.
    if round((v_amount - v_fee - v_balance) * coalesce(v_exchange.rate, 1)) > v_other then
        return api.refuse(v_admitted, 409, 'balance-too-low', jsonb_build_object(
            'needed', v_amount, 'balance', v_balance + floor(v_other / coalesce(v_exchange.rate, 1))::bigint,
            'currency', v_payment.currency));
    end if;

    insert into surety.refunds (
        id, payment_id, merchant_id, amount_minor, currency, reason, metadata, provider, provider_account, is_ours,
        created_at, updated_at
    )
    values (
        surety.new_id('ref', v_now), v_payment.id, v_payment.merchant_id, v_amount, v_payment.currency,
        p_request ->> 'reason', coalesce(p_request -> 'metadata', '{}'), v_payment.provider,
        v_payment.provider_account, true, v_now, v_now
    )
    returning * into v_refund;
    insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor, request_id)
    values (
        v_refund.id, 1, null, 'pending', 'request', v_now, v_admitted.actor, p_request ->> 'request_id'
    );
    perform surety.advance(
        array(select d from surety.derive(array[v_payment.id]) as d), 'command', v_admitted.actor,
        p_request ->> 'request_id');
    perform ledger.post(array[(
        v_refund.id || ':asked', 'refund_asked', v_payment.id, v_payment.merchant_id,
        v_payment.provider || '/' || v_payment.provider_account, v_payment.currency, v_amount, null, null, null, null,
        null, null, null
    )::ledger.entry], v_now);
    return api.conclude(
        v_admitted, p_request, v_payment.id, 201,
        (select shown.document::text from api.show_refund(v_refund) as shown),
        jsonb_build_object('amount', v_amount, 'currency', v_payment.currency, 'refund', v_refund.id));
end;
$$;

create or replace function surety.begin_refunds(
    p_batch bigint, p_fence bigint, p_actor text, p_event_ids text[] default null
) returns table (
    event_id text, refund_id text, refund_minor bigint, payment_id text, todo text, idempotency_key text,
    request jsonb, account text, provider_id text, first_sent_at timestamptz, last_sent_at timestamptz,
    amount_minor bigint, currency text, livemode boolean
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- As surety.begin_calls, for refunds that were asked for here:
--   send   the request, under the key, both as they were written down
--   ask    whether the provider has it; if not, send it again, the same
--   renew  likewise, but under a fresh key: what the old one would replay is no answer
--   skip   nothing is left to do
declare
    v_now timestamptz := surety.time_now();
begin
    perform from surety.payments as p
    where p.id in (
        select e.payload ->> 'payment_id' from outbox.batch_events(p_batch, p_fence) as e
        where p_event_ids is null or e.event_id = any(p_event_ids)
    )
    order by p.id for update;
    return query
    with events as (
        select
            e.event_id, r.id as refund_id, r as refund, p as payment,
            c.first_sent_at, c.last_sent_at, c.answered_at, c.status, c.payment_id is not null as was_sent
        from outbox.batch_events(p_batch, p_fence) as e
        join surety.refunds as r on r.id = e.aggregate_id
        join surety.payments as p on p.id = r.payment_id
        left join surety.calls as c on c.payment_id = r.payment_id and c.operation = 'refund:' || r.id
        where p_event_ids is null or e.event_id = any(p_event_ids)
    ),
    judged as (
        select
            e.*,
            case
                when (e.refund).state <> 'pending' or (e.refund).provider_id is not null then 'skip'
                when not e.was_sent or e.status between 400 and 499 then 'send'
                when e.status >= 500 or e.first_sent_at < v_now - interval '23 hours' then 'renew'
                else 'ask'
            end as verdict
        from events as e
    ),
    written as (
        insert into surety.calls as c (payment_id, operation, idempotency_key, request, first_sent_at, last_sent_at)
        select
            (j.payment).id, 'refund:' || j.refund_id, j.refund_id || ':create',
            jsonb_strip_nulls(jsonb_build_object(
                'payment_intent', (j.payment).provider_id,
                'amount', (j.refund).amount_minor,
                'reason', (j.refund).reason,
                'metadata', jsonb_build_object(
                    'surety_refund', j.refund_id,
                    'surety_payment', (j.payment).id,
                    'surety_environment', (select i.id from surety.environment as i)
                )))::text,
            v_now, v_now
        from judged as j where j.verdict <> 'skip'
        order by (j.payment).id, j.refund_id
        on conflict on constraint calls_pkey do update
        set
            sends = c.sends + 1,
            last_sent_at = excluded.last_sent_at,
            -- While it is only asked about, the last answer still decides whether the key can be used again.
            (answered_at, status) = (
                select c.answered_at, c.status from judged as a
                where 'refund:' || a.refund_id = c.operation and a.verdict = 'renew'
            )
        returning c.payment_id, c.operation, c.idempotency_key, c.request, c.sends, c.first_sent_at, c.last_sent_at
    ),
    told as (
        insert into audit.entries (id, at, kind, actor, payment_id, merchant_id, outcome, snapshot)
        select
            surety.new_id('aud', v_now), v_now, 'call', p_actor, w.payment_id, (j.payment).merchant_id,
            case j.verdict when 'send' then 'sent' else 'asked' end,
            jsonb_build_object('operation', w.operation, 'key', w.idempotency_key, 'sends', w.sends)
        from judged as j join written as w on w.operation = 'refund:' || j.refund_id
    )
    select
        j.event_id, j.refund_id, (j.refund).amount_minor, (j.payment).id, j.verdict, w.idempotency_key,
        w.request::jsonb, (j.payment).provider_account, (j.payment).provider_id, w.first_sent_at,
        coalesce(j.last_sent_at, w.last_sent_at), (j.payment).amount_minor, (j.payment).currency, (j.payment).livemode
    from judged as j left join written as w on w.operation = 'refund:' || j.refund_id
    order by j.event_id;
end;
$$;

create or replace function surety.refuse_refunds(p_results jsonb, p_actor text) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Refunds that the provider would not make, of payments that are locked: they have failed, and nothing exists there.
declare
    v_now timestamptz := surety.time_now();
    v_refused surety.refunds [];
    v_types text [];
begin
    with refused as (
        update surety.refunds as r
        set failure = told.refused
        from jsonb_to_recordset(p_results) as told (refund_id text, refused jsonb)
        where r.id = told.refund_id and told.refused is not null and r.state = 'pending' and r.provider_id is null
        returning r
    )
    select array_agg(f.r order by (f.r).payment_id, (f.r).id) into v_refused from refused as f;
    if v_refused is null then
        return '{}';
    end if;
    insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor)
    select r.id, r.version + 1, r.state, 'failed', 'refused', v_now, p_actor from unnest(v_refused) as r;
    v_types := surety.advance(
        array(
            select d from surety.derive(array(select distinct r.payment_id from unnest(v_refused) as r)) as d
        ), 'response', p_actor, null);
    perform ledger.post(array_agg((
        r.id || ':failed', 'refund_failed', r.payment_id, r.merchant_id, r.provider || '/' || r.provider_account,
        r.currency, r.amount_minor, null, null, null, null, null, null, null
    )::ledger.entry), v_now)
    from unnest(v_refused) as r;
    return v_types || 'refund.failed'::text;
end;
$$;

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
        cross join lateral surety.refund_told(r) as best
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
        cross join lateral surety.refund_told(r) as best
        where best.state <> r.state
        order by r.id
        returning to_state
    )
    select array_agg(distinct 'refund.' || w.to_state) into v_types from walked as w;
    return coalesce(v_types, '{}');
end;
$$;

create or replace function surety.refund_told(p_refund surety.refunds)
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

create or replace function api.get_refund(p_key_hash bytea, p_id text) returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select shown.document::text
            from surety.refunds cross join lateral api.show_refund(refunds) as shown
            where refunds.id = p_id and refunds.merchant_id = who.merchant_id
        )
    from api.identify(p_key_hash) as who;
end;

create or replace function api.list_refunds(
    p_key_hash bytea, p_payment text, p_limit integer, p_starting_after text
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Newest first, all of a merchant's or those of one payment. No row: no such key.
declare
    v_merchant text := (select k.merchant_id from api.identify(p_key_hash) as k);
    v_ids text [];
begin
    if v_merchant is null then
        return;
    end if;
    if p_payment is null then
        v_ids := array(
            select r.id from surety.refunds as r
            where r.merchant_id = v_merchant and r.id < coalesce(p_starting_after, 'ref_g')
            order by r.id desc
            limit p_limit + 1
        );
    else
        v_ids := array(
            select r.id from surety.refunds as r
            where r.payment_id = p_payment and r.merchant_id = v_merchant and r.id < coalesce(p_starting_after, 'ref_g')
            order by r.id desc
            limit p_limit + 1
        );
    end if;
    return query
    select
        v_merchant,
        json_build_object(
            'object', 'list',
            'data', coalesce(
                (
                    select json_agg(shown.document order by r.id desc)
                    from surety.refunds as r cross join lateral api.show_refund(r) as shown
                    where r.id = any(v_ids[1:p_limit])
                ),
                '[]'::json
            ),
            'has_more', cardinality(v_ids) > p_limit
        )::text;
end;
$$;

create or replace function surety.claim_refund_questions(p_limit integer)
returns table (
    refund_id text, payment_id text, provider_id text, intent_id text, account text, livemode boolean
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with due as (
        select refunds.id
        from surety.refunds
        where
            refunds.ask_at <= surety.time_now()
            and not exists (
                select from surety.breakers
                where
                    breakers.provider = refunds.provider and breakers.account = refunds.provider_account
                    and breakers.opened_at is not null
            )
        order by refunds.ask_at
        limit p_limit
        for update skip locked
    ),

    claimed as (
        update surety.refunds
        set
            asked = refunds.asked + 1,
            ask_at = surety.time_now() + refund_states.ask_after * least(64, 2 ^ (refunds.asked + 1))
        from due, surety.refund_states
        where refunds.id = due.id and refunds.state = refund_states.state
        returning refunds.id, refunds.payment_id, refunds.provider_id, refunds.provider_account
    )

    select
        claimed.id,
        claimed.payment_id,
        claimed.provider_id,
        payments.provider_id,
        claimed.provider_account,
        payments.livemode
    from claimed
    inner join surety.payments on claimed.payment_id = payments.id
    left join surety.calls
        on claimed.payment_id = calls.payment_id and calls.operation = 'refund:' || claimed.id
    -- Nothing was sent for it, so there is nothing to ask.
    where claimed.provider_id is not null or calls.payment_id is not null;
end;
comment on function surety.claim_refund_questions(integer) is
'Refunds under way that the sweep should ask their provider about now, at growing intervals. One without provider_id was
sent, and nobody knows whether it came there: it is among those of the intent, or is not.';
