-- The merchant's balance, and the postings that changed it.

create or replace function api.get_balance(p_key_hash bytea, p_address text default '')
returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        json_build_object('object', 'balance', 'data', coalesce((
            select json_agg(json_build_object(
                'currency', totals.currency,
                'pending', totals.pending,
                'available', totals.available,
                'disputed', totals.disputed,
                'reserved_for_refunds', totals.reserved_for_refunds,
                'reserved_for_payouts', totals.reserved_for_payouts
            ) order by totals.currency)
            from (
                select
                    currencies.currency,
                    coalesce(sum(balances.balance_minor) filter (where kinds.kind = 'pending'), 0)::bigint as pending,
                    coalesce(sum(balances.balance_minor) filter (where kinds.kind = 'available'), 0)::bigint
                        as available,
                    coalesce(sum(balances.balance_minor) filter (where kinds.kind = 'disputed'), 0)::bigint as disputed,
                    coalesce(sum(balances.balance_minor) filter (where kinds.kind = 'reserved_for_refunds'), 0)::bigint
                        as reserved_for_refunds,
                    coalesce(sum(balances.balance_minor) filter (where kinds.kind = 'reserved_for_payouts'), 0)::bigint
                        as reserved_for_payouts
                from surety.currencies
                cross join (
                    values
                    ('pending'),
                    ('available'),
                    ('disputed'),
                    ('reserved_for_refunds'),
                    ('reserved_for_payouts')
                ) as kinds (kind)
                inner join ledger.balances
                    on balances.account_id = kinds.kind || ':' || who.merchant_id || ':' || currencies.currency
                group by currencies.currency
            ) as totals
        ), '[]'::json))::text
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;

comment on function api.get_balance(bytea, text) is
'The balance of the merchant by currency, in minor units: pending (not settled), available (may be negative), disputed,
reserved_for_refunds, reserved_for_payouts. No row: the key may not read.';

create or replace function api.list_balance_transactions(
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
        select from ledger.postings as c where c.id = p_starting_after and c.merchant_id = v_merchant
    ) then
        perform api.refuse_cursor();
    end if;
    if p_payment is null then
        v_ids := array(
            select g.id from ledger.postings as g
            where g.merchant_id = v_merchant and g.id < coalesce(p_starting_after, 'pst_g')
                and exists (
                    select from ledger.transfers as t
                    where t.posting_id = g.id
                        and v_merchant in (split_part(t.debit_account, ':', 2), split_part(t.credit_account, ':', 2))
                )
            order by g.id desc
            limit p_limit + 1
        );
    else
        v_ids := array(
            select g.id from ledger.postings as g
            where g.payment_id = p_payment and g.merchant_id = v_merchant
                and g.id < coalesce(p_starting_after, 'pst_g')
                and exists (
                    select from ledger.transfers as t
                    where t.posting_id = g.id
                        and v_merchant in (split_part(t.debit_account, ':', 2), split_part(t.credit_account, ':', 2))
                )
            order by g.id desc
            limit p_limit + 1
        );
    end if;
    return query
    select v_merchant, api.render_page(
        array(
            select json_build_object(
                'id', g.id, 'object', 'balance_transaction', 'type', g.rule, 'payment', g.payment_id,
                'changes', c.changes, 'created_at', surety.format_time(g.at))
            from ledger.postings as g
            cross join lateral (
                select json_agg(json_build_object(
                    'account', s.account, 'amount', s.amount, 'currency', s.currency
                ) order by s.account, s.currency) as changes
                from (
                    select
                        split_part(l.account_id, ':', 1) as account, l.currency,
                        sum(l.amount)::bigint as amount
                    from (
                        select t.credit_account as account_id, t.currency, t.amount_minor as amount
                        from ledger.transfers as t where t.posting_id = g.id
                        union all
                        select t.debit_account, t.currency, - t.amount_minor
                        from ledger.transfers as t where t.posting_id = g.id
                    ) as l
                    where split_part(l.account_id, ':', 2) = v_merchant
                    group by 1, 2
                ) as s
            ) as c
            where g.id = any(v_ids)
            order by g.id desc
        ),
        p_limit);
end;
$$;

comment on function api.list_balance_transactions(bytea, text, integer, text, text) is
'A page of the postings that changed the merchant''s accounts, newest first, each with its changes by account and
currency. p_payment: of one payment only; p_starting_after: the last id of the page before.
No row: the key may not read.';

create or replace function api.list_currencies(p_key_hash bytea, p_address text default '')
returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        api.render_page(
            array(
                select row_to_json(shown.*)
                from (
                    select
                        currencies.currency as id,
                        'currency' as object,
                        currencies.exponent as exponent,
                        currencies.minimum_minor as minimum,
                        currencies.maximum_minor as maximum,
                        currencies.step_minor as step
                    from surety.currencies
                    order by currencies.currency
                ) as shown
            ),
            1000
        )
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;

comment on function api.list_currencies(bytea, text) is
'The currencies accepted, with the exponent of the minor unit and the bounds of a payment''s amount in minor units. No
row: the key may not read.';
