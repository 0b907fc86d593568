-- What a merchant is owed, and every posting that changed it.

create or replace function api.account_name(p_kind text) returns text
language sql immutable parallel safe
begin atomic
    select case p_kind when 'disputed' then 'held' when 'reserved_for_refunds' then 'refunding' else p_kind end;
end;

create or replace function api.get_balance(p_key_hash bytea) returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        json_build_object('object', 'balance', 'data', coalesce((
            select json_agg(json_build_object(
                'currency', kept.currency,
                'pending', kept.pending,
                'available', kept.available,
                'held', kept.held,
                'refunding', kept.refunding
            ) order by kept.currency)
            from (
                select
                    currencies.currency,
                    sum(case when kinds.kind = 'pending' then balances.balance_minor else 0 end)::bigint as pending,
                    sum(case when kinds.kind = 'available' then balances.balance_minor else 0 end)::bigint as available,
                    sum(case when kinds.kind = 'disputed' then balances.balance_minor else 0 end)::bigint as held,
                    sum(case when kinds.kind = 'reserved_for_refunds' then balances.balance_minor else 0 end)::bigint
                        as refunding
                from surety.currencies
                cross join (values ('pending'), ('available'), ('disputed'), ('reserved_for_refunds')) as kinds (kind)
                inner join ledger.balances
                    on balances.account_id = kinds.kind || ':' || who.merchant_id || ':' || currencies.currency
                group by currencies.currency
            ) as kept
        ), '[]'::json))::text
    from api.identify_merchant(p_key_hash) as who;
end;

comment on function api.get_balance(bytea) is
'What the merchant is owed by currency: pending (not settled), available (may be negative), held in disputes, on its way
back to payers. No row: no such key.';

create or replace function api.list_balance_transactions(
    p_key_hash bytea, p_payment text, p_limit integer, p_starting_after text
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Newest first: the postings that changed the merchant's accounts, each with its changes. No row: no such key.
declare
    v_merchant text := (select k.merchant_id from api.identify_merchant(p_key_hash) as k);
    v_ids text [];
begin
    if v_merchant is null then
        return;
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
    select
        v_merchant,
        json_build_object(
            'object', 'list',
            'data', coalesce(json_agg(json_build_object(
                'id', g.id, 'object', 'balance_transaction', 'type', g.rule, 'payment', g.payment_id,
                'changes', c.changes, 'created_at', surety.format_time(g.at)) order by g.id desc), '[]'::json),
            'has_more', cardinality(v_ids) > p_limit
        )::text
    from ledger.postings as g
    cross join lateral (
        select json_agg(json_build_object(
            'account', s.account, 'amount', s.amount, 'currency', s.currency) order by s.account, s.currency) as changes
        from (
            select
                api.account_name(split_part(l.account_id, ':', 1)) as account, l.currency,
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
    where g.id = any(v_ids[1:p_limit]);
end;
$$;
