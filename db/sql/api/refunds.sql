-- Refunds: create, read, list.

create or replace function api.create_refund(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_admitted api.admission := api.admit_command('POST /v1/payments/{id}/refunds', 'refunds:write', p_request);
    v_now timestamptz := v_admitted.admitted_at;
    v_payment surety.payments;
    v_refund surety.refunds;
    v_left bigint;
    v_amount bigint;
    v_broken jsonb;
    v_exchange record;
    v_accounts text [];
    v_balance bigint;
    v_other bigint;
    v_fee bigint;
begin
    if not v_admitted.outcome is null then
        return v_admitted.outcome;
    end if;
    select p.* into v_payment from surety.payments as p
    where p.id = p_request ->> 'payment_id' and p.merchant_id = v_admitted.merchant_id
    for update;
    if not found then
        return api.refuse_command(v_admitted, 'not-found', null);
    end if;
    v_left := api.whole_steps(
        v_payment.captured_minor - v_payment.refunded_minor - v_payment.refund_pending_minor
        - v_payment.at_risk_minor - v_payment.reversed_minor, v_payment.currency);
    if v_payment.state not in ('confirmed', 'settled', 'partially_refunded') or v_left <= 0 then
        return api.refuse_command(v_admitted, 'wrong-state', jsonb_build_object(
            'state', v_payment.state,
            'reason', case when v_payment.state in ('confirmed', 'settled', 'partially_refunded')
                then 'all of it is refunded or being refunded' end));
    end if;
    v_amount := coalesce((p_request ->> 'amount')::bigint, v_left);
    v_broken := api.check_part(v_amount, v_left, v_payment.currency);
    if v_broken is not null then
        return api.refuse_command(v_admitted, 'invalid-request', v_broken);
    end if;

    select e.currency, e.rate into v_exchange from surety.charge_exchange_rate(v_payment.id) as e;
    v_accounts := array(
        select a.kind || ':' || v_payment.merchant_id || ':' || c.currency
        from unnest(array['available', 'pending']) as a (kind)
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
    where g.payment_id = v_payment.id and g.rule in ('captured', 'captured_ach')
        and t.credit_account like 'fee\_revenue:%';
    -- Rounded as at settlement; otherwise the balance of a merchant without other money could be short by a cent.
    if round((v_amount - v_fee - v_balance) * coalesce(v_exchange.rate, 1)) > v_other then
        return api.refuse_command(v_admitted, 'balance-too-low', jsonb_build_object(
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
    perform surety.advance_payments(
        array(select d from surety.derive_payments(array[v_payment.id]) as d), 'command', v_admitted.actor,
        p_request ->> 'request_id');
    perform ledger.post(array[ledger.entry(
        p_cause => v_refund.id || ':asked', p_rule => 'refund_asked', p_payment_id => v_payment.id,
        p_merchant_id => v_payment.merchant_id,
        p_provider_owner => v_payment.provider || '/' || v_payment.provider_account,
        p_currency => v_payment.currency, p_gross => v_amount)], v_now);
    return api.complete_command(
        v_admitted, p_request, v_payment.id, 201,
        (select shown.document::text from api.show_refund(v_refund) as shown),
        jsonb_build_object('amount', v_amount, 'currency', v_payment.currency, 'refund', v_refund.id));
end;
$$;

comment on function api.create_refund(jsonb) is
'Creates a refund; p_request as for api.admit_command, with payment_id and optionally amount (minor units), reason and
metadata. Without an amount, the rest is refunded. 201 and the refund, pending; its amount is reserved.
Problems: not-found; wrong-state, detail {state, reason}; invalid-request if the amount exceeds the rest or is no
multiple of the currency''s step; balance-too-low, detail {needed, balance, currency}. The merchant''s pending and
available balance must cover the refund, except for our fee of this payment, so that a merchant with no other money can
refund it in full. A balance in the currency of an exchange counts at the payment''s own rate.';

create or replace function api.get_refund(
    p_key_hash bytea, p_id text, p_address text default '', p_scope text default 'read'
) returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select shown.document::text
            from surety.refunds cross join lateral api.show_refund(refunds) as shown
            where refunds.id = p_id and refunds.merchant_id = who.merchant_id
        )
    from api.identify_merchant(p_key_hash, p_scope, p_address) as who;
end;

comment on function api.get_refund(bytea, text, text, text) is
'A refund of the merchant; body is null if it has none of that id. No row: the key may not be used for p_scope.';

create or replace function api.list_refunds(
    p_key_hash bytea, p_payment text, p_limit integer, p_starting_after text, p_address text default ''
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_merchant text := (select k.merchant_id from api.identify_merchant(p_key_hash, 'read', p_address) as k);
    v_ids text [];
begin
    if v_merchant is null then
        return;
    end if;
    if p_starting_after is not null and not exists (
        select from surety.refunds as c where c.id = p_starting_after and c.merchant_id = v_merchant
    ) then
        perform api.refuse_cursor();
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
    select v_merchant, api.render_page(
        array(
            select shown.document
            from surety.refunds as r cross join lateral api.show_refund(r) as shown
            where r.id = any(v_ids)
            order by r.id desc
        ),
        p_limit);
end;
$$;

comment on function api.list_refunds(bytea, text, integer, text, text) is
'A page of the merchant''s refunds, newest first. p_payment: of one payment only; p_starting_after: the last id of the
page before. No row: the key may not read.';
