-- Statements: the postings of a merchant in a period, between its balances at the beginning and at the end.

create or replace function ledger.statement_lines(
    p_merchant_id text, p_from timestamptz, p_to timestamptz, p_after text, p_limit integer
) returns table (
    posting_id text, booked_at timestamptz, rule text, payment_id text, reference text, object_id text,
    currency text, gross_minor bigint, fee_minor bigint, net_minor bigint, changes jsonb, recorded_at timestamptz
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_custom_plan
as $$
-- Planned for each call: a plan for all periods and merchants would read the postings of all.
-- A page of postings by the merchant's index; all else is looked up for each of them.
declare
    v_first text := greatest(p_after, surety.id_at('pst', p_from)) collate "C";
    v_end text := surety.id_at('pst', p_to);
begin
    return query
    with page as (
        select g.id, g.at, g.rule, g.cause, g.payment_id
        from ledger.postings as g
        where g.merchant_id = p_merchant_id and g.id > v_first and g.id < v_end
            -- A posting may move the provider's accounts alone. `exists` would be a join over the whole period.
            and (
                select true from ledger.transfers as t
                where t.posting_id = g.id and t.posting_id > v_first and t.posting_id < v_end
                    and p_merchant_id in (split_part(t.debit_account, ':', 2), split_part(t.credit_account, ':', 2))
                limit 1
            )
        order by g.id
        limit p_limit
    )
    select
        g.id, g.at, g.rule, g.payment_id, p.reference, split_part(g.cause, ':', 1), m.currency,
        m.net_minor - m.fee_minor, m.fee_minor, m.net_minor, m.changes, r.recorded_at
    from page as g
    cross join lateral (
        select
            c.currency,
            coalesce(sum(c.amount_minor) filter (where c.kind = 'fee'), 0)::bigint as fee_minor,
            coalesce(sum(c.amount_minor) filter (where c.kind <> 'fee'), 0)::bigint as net_minor,
            coalesce(jsonb_object_agg(c.kind, c.amount_minor) filter (where c.kind <> 'fee'), '{}') as changes
        from (
            select l.kind, l.currency, sum(l.amount_minor)::bigint as amount_minor
            from ledger.transfers as t
            cross join lateral (
                values
                (split_part(t.credit_account, ':', 1), split_part(t.credit_account, ':', 2), t.currency,
                    t.amount_minor),
                (split_part(t.debit_account, ':', 1), split_part(t.debit_account, ':', 2), t.currency,
                    - t.amount_minor),
                -- Our fee, as the merchant sees it: a payment to fee_revenue lowers its balance.
                ('fee', p_merchant_id, t.currency, case
                    when t.credit_account like 'fee\_revenue:%' then - t.amount_minor
                    when t.debit_account like 'fee\_revenue:%' then t.amount_minor
                end)
            ) as l (kind, owner_id, currency, amount_minor)
            where t.posting_id = g.id and t.posting_id > v_first and t.posting_id < v_end
                and l.owner_id = p_merchant_id and l.amount_minor is not null
                and p_merchant_id in (split_part(t.debit_account, ':', 2), split_part(t.credit_account, ':', 2))
            group by 1, 2
        ) as c
        group by c.currency
    ) as m
    left join surety.payments as p on p.id = g.payment_id
    left join lateral (
        -- The provider's record: that of the object, or the one that the posting is named by.
        select min(f.occurred_at) as recorded_at
        from surety.facts as f
        where f.payment_id = g.payment_id and f.kind = 'money' and f.disregarded is null and f.recorded_at < p_to
            and (
                f.object_id = g.cause
                or f.data ->> 'source' = split_part(g.cause, ':', 1) and f.data ->> 'category' = case g.rule
                    when 'captured' then 'charge'
                    when 'dispute_opened' then 'dispute'
                    when 'dispute_reinstated' then 'dispute_reversal'
                    when 'dispute_won' then 'dispute_reversal'
                end
            )
    ) as r on true
    order by g.id, m.currency;
end;
$$;

comment on function ledger.statement_lines(text, timestamptz, timestamptz, text, integer) is
'The lines of a merchant''s statement from p_from until before p_to, in the order of booking: for each of at most
p_limit postings after p_after (an id, or empty) a line per currency. changes has the amount by kind of account; their
sum, net_minor, is gross_minor and fee_minor, which is negative where we took a fee. recorded_at is the time of the
provider''s record, null if it is not known or was not known before p_to. Amounts in minor units.';

create or replace function ledger.statement_balances(p_merchant_id text, p_from timestamptz, p_to timestamptz)
returns table (currency text, kind text, opening_minor bigint, closing_minor bigint)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        balances.currency,
        balances.kind,
        coalesce(sum(balances.balance_minor) filter (where balances.is_opening), 0)::bigint,
        coalesce(sum(balances.balance_minor) filter (where not balances.is_opening), 0)::bigint
    from (
        select
            opening.currency,
            opening.kind,
            opening.balance_minor,
            true as is_opening
        from ledger.merchant_balances_at(p_merchant_id, p_from) as opening
        union all
        select
            closing.currency,
            closing.kind,
            closing.balance_minor,
            false
        from ledger.merchant_balances_at(p_merchant_id, p_to) as closing
    ) as balances
    group by balances.currency, balances.kind
    order by balances.currency, balances.kind;
end;

comment on function ledger.statement_balances(text, timestamptz, timestamptz) is
'The balances of a merchant''s accounts at p_from and at p_to, in minor units, by currency and kind of account. An
account without postings before p_to has no row.';
