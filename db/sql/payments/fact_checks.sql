-- Checks of facts: a contradiction becomes a discrepancy, never an error.

create or replace function surety.mark_mismatched_facts(p_facts surety.facts[], p_at timestamptz) returns surety.facts[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_facts surety.facts [] := p_facts;
    v_mismatch record;
begin
    for v_mismatch in
        select f.ordinality::integer as place, judged.reason
        from unnest(p_facts) with ordinality as f join surety.payments as p on p.id = f.payment_id
        cross join lateral (
            select case
                -- The bank that carries an ACH payment has accounts of its own.
                when case
                    when f.provider = p.provider then f.account <> p.provider_account else p.rail <> 'ach'
                end then 'account'
                when f.livemode <> p.livemode then 'livemode'
                when f.currency <> p.currency and f.kind not in ('money', 'available') then 'currency'
                when
                    f.kind = 'money' and f.currency <> p.currency
                    and coalesce(f.data ->> 'other_currency', f.currency) <> p.currency then 'currency'
                when f.kind = 'submitted' and f.amount_minor <> p.amount_minor then 'amount'
            end as reason
        ) as judged
        where judged.reason is not null
        order by f.payment_id, f.object_id, f.kind
    loop
        v_facts[v_mismatch.place].disregarded := v_mismatch.reason;
    end loop;
    perform surety.open_discrepancy(
        f.disregarded, f.object_id || ':' || f.kind, 'critical',
        format('%s %s does not fit its payment: %s', f.kind, f.object_id, f.disregarded),
        jsonb_build_array(case f.disregarded
            when 'account' then surety.differing_value(
                'account', p.provider || '/' || p.provider_account, f.provider || '/' || f.account)
            when 'livemode' then surety.differing_value('livemode', p.livemode::text, f.livemode::text)
            when 'currency' then surety.differing_value(
                'currency', p.currency, coalesce(f.data ->> 'other_currency', f.currency))
            when 'amount' then surety.differing_amount('amount', p.amount_minor, f.amount_minor)
        end),
        f.payment_id, f.id, p_at, p_payment_id => f.payment_id, p_data => to_jsonb(f))
    from unnest(v_facts) as f join surety.payments as p on p.id = f.payment_id
    where f.disregarded is not null
    order by f.disregarded, f.object_id, f.kind;
    return v_facts;
end;
$$;

comment on function surety.mark_mismatched_facts(surety.facts[], timestamptz) is
'The facts, with disregarded set where one can''t be about its payment: another account, mode or currency, or an intent
for another amount, which must not be confirmed. Each of these opens a critical discrepancy. The payments are locked.';

create or replace function surety.report_contradicting_facts(p_facts surety.facts[], p_at timestamptz) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    select surety.open_discrepancy(
        case
            when known.id is null then 'duplicate'
            when f.currency is distinct from known.currency then 'currency'
            else 'amount'
        end,
        f.object_id || ':' || f.kind, 'critical',
        case
            when known.id is null then format('%s %s is known of another payment', f.kind, f.object_id)
            else format(
                '%s %s is known with %s %s, now reported with %s %s',
                f.kind, f.object_id, known.amount_minor, known.currency, f.amount_minor, f.currency
            )
        end,
        case
            when known.id is null then jsonb_build_array(
                surety.differing_value('payment', linked.payment_id, f.payment_id)
            )
            else
                case
                    when f.amount_minor is not distinct from known.amount_minor then '[]'::jsonb
                    else jsonb_build_array(
                        surety.differing_amount('amount', known.amount_minor, f.amount_minor)
                    )
                end
                || case
                    when f.currency is not distinct from known.currency then '[]'::jsonb
                    else jsonb_build_array(surety.differing_value('currency', known.currency, f.currency))
                end
        end,
        keys.fact_id, coalesce(f.source_id, f.object_id), p_at,
        p_payment_id => f.payment_id, p_data => jsonb_build_object('received', to_jsonb(f), 'known', keys.fact_id)
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
        -- The known fact may be in the same array: the first of its key.
        select
            received.id,
            received.amount_minor,
            received.currency
        from unnest(p_facts) as received
        where keys.fact_id = received.id and f.payment_id = received.payment_id
    ) as known on true
    left join surety.provider_objects as linked
        on f.provider = linked.provider and f.account = linked.account and f.object_id = linked.object_id
    where
        keys.fact_id <> f.id
        and (
            known.id is null
            or f.amount_minor is distinct from known.amount_minor or f.currency is distinct from known.currency
        )
    order by f.object_id, f.kind, f.id;
end;

comment on function surety.report_contradicting_facts(surety.facts[], timestamptz) is
'Opens a critical discrepancy for each fact whose key is known with another amount, currency or payment, whatever the
source of either.';

create or replace function surety.cancel_duplicate_intents(p_facts surety.facts[], p_at timestamptz) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- A payment has exactly one intent. A second one is never confirmed, so it can't charge.
declare
    v_duplicates surety.facts [];
begin
    select array_agg(f order by f.payment_id, f.object_id) into v_duplicates
    from unnest(p_facts) as f join surety.payments as p on p.id = f.payment_id
    where f.kind in ('submitted', 'canceled', 'failed') and f.disregarded is null and f.object_id <> p.provider_id;
    if v_duplicates is null then
        return '{}';
    end if;
    perform surety.open_discrepancy(
        'duplicate', f.object_id, 'warning', format('%s is a second intent beside %s', f.object_id, p.provider_id),
        jsonb_build_array(surety.differing_value('intent', p.provider_id, f.object_id)), f.payment_id, f.id, p_at,
        p_payment_id => f.payment_id, p_data => to_jsonb(f))
    from unnest(v_duplicates) as f join surety.payments as p on p.id = f.payment_id
    where f.kind = 'submitted'
    order by f.object_id;
    perform surety.close_discrepancies('duplicate', array_agg(f.object_id), 'it is canceled', p_at)
    from unnest(v_duplicates) as f
    where f.kind in ('canceled', 'failed');
    perform outbox.emit_event(
        'payment', f.payment_id, 'payment.orphan_found',
        jsonb_build_object('payment_id', f.payment_id, 'object_id', f.object_id, 'reason', 'a second intent'),
        null, null)
    from unnest(v_duplicates) as f
    where f.kind = 'submitted' and not exists (
        select from unnest(v_duplicates) as ended
        where ended.object_id = f.object_id and ended.kind in ('canceled', 'failed')
    );
    return case when found then array['payment.orphan_found'] else '{}' end;
end;
$$;

comment on function surety.cancel_duplicate_intents(surety.facts[], timestamptz) is
'Opens a discrepancy for each second intent of a payment and emits payment.orphan_found, whose handler cancels it.
Closes the discrepancy once a fact says that the intent has ended. The payments are locked and advanced. Returns the
types of the events made.';

create or replace function surety.emit_declined_attempts(p_facts surety.facts[]) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_declined text [];
begin
    select array_agg(distinct f.payment_id) into v_declined
    from unnest(p_facts) as f
    join surety.payments as p on p.id = f.payment_id
    join surety.states as s on s.state = p.state
    where f.kind = 'attempt_failed' and f.object_id = p.provider_id and f.disregarded is null and not s.is_final
        and p.captured_minor = 0;
    if v_declined is not null then
        perform outbox.emit_event(
            'payment', p.id, 'payment.attempt_failed',
            jsonb_build_object('payment_id', p.id, 'reason', 'declined'), null, p.version)
        from surety.payments as p where p.id = any(v_declined);
        return array['payment.attempt_failed'];
    end if;
    return '{}';
end;
$$;

comment on function surety.emit_declined_attempts(surety.facts[]) is
'Emits payment.attempt_failed for payments whose intent was declined and lives on: its handler cancels the intent, then
the payment fails. The payments are locked and advanced. Returns the types of the events made.';
