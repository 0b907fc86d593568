-- Postings of facts: each cause with its rule and amounts, for ledger.post.
--
-- A payment's state changes the merchant's accounts; only balance transactions change the provider's accounts.
-- An ACH payment is carried by a bank or by Stripe. The fact's provider decides which accounts its money goes through:
-- bank and ach_clearing, or provider_balance and provider_receivable.

create or replace function surety.posting_rule(p_provider text, p_category text, p_is_exchanged boolean) returns text
language sql immutable parallel safe
begin atomic
    -- Refunds and disputes are reserved or held in the payment's currency. Where the money was exchanged, the merchant
    -- pays them in the other currency, at the rate of that day.
    select case
        when p_provider = 'bank' and p_category in ('ach_credit', 'ach_return') then p_category
        when p_provider = 'bank' and p_category in ('refund', 'refund_failure') then 'refund_ach'
        when p_provider = 'bank' and p_category = 'fee' then 'bank_fee'
        when p_provider = 'bank' then 'foreign_bank'
        when p_category in ('charge', 'partial_capture_reversal', 'charge_failure') and p_is_exchanged
            then 'charge_exchanged'
        when p_category in ('charge', 'partial_capture_reversal') then 'charge'
        when p_category in ('refund', 'refund_failure') and p_is_exchanged then 'refund_exchanged'
        when p_category in ('dispute', 'dispute_reversal') and p_is_exchanged then 'dispute_exchanged'
        when
            p_category in (
                'charge_failure', 'refund', 'refund_failure', 'dispute', 'dispute_reversal', 'payout',
                'payout_reversal', 'bank_line'
            )
            then p_category
        when p_category in ('fee', 'tax', 'network_cost') then 'provider_fee'
        when p_category = 'risk_reserved_funds' then 'reserve'
        else 'foreign'
    end;
end;

comment on function surety.posting_rule(text, text, boolean) is
'The ledger.rules.rule of a balance transaction, by its provider, its category and whether its record is in another
currency than the payment. A category without a rule of its own goes to suspense (foreign, foreign_bank), so that no
money stays unbooked.';

create or replace function surety.charge_exchange_rate(p_payment_id text) returns table (currency text, rate numeric)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        facts.currency,
        -- The provider may name no rate: the two amounts imply it.
        coalesce(
            (facts.data ->> 'rate')::numeric,
            facts.amount_minor::numeric / nullif((facts.data ->> 'other_gross')::bigint, 0)
        )
    from surety.facts
    where
        facts.payment_id = p_payment_id and facts.kind = 'money' and facts.data ? 'other_currency'
        and facts.data ->> 'category' = 'charge' and facts.disregarded is null
    order by facts.object_id
    limit 1;
end;

comment on function surety.charge_exchange_rate(text) is
'The currency in which a payment''s charge arrived and its rate, units of it per unit of the payment''s; no row if it
arrived in its own. The rate is the provider''s, or the one that the amounts imply if it names none. Refunds and
disputes have rates of their own.';

create or replace function surety.fee_terms(p_merchant_id text, p_currency text, p_at timestamptz)
returns table (basis_points integer, fixed_minor bigint, effective_at timestamptz)
language sql stable
begin atomic
    -- No set clause, so that PostgreSQL can inline the function.
    select
        coalesce(agreed.basis_points, merchants.fee_basis_points),
        coalesce(agreed.fixed_minor, currencies.fee_fixed_minor),
        agreed.effective_at
    from surety.merchants
    cross join surety.currencies
    left join lateral (
        select
            fee_rates.basis_points,
            fee_rates.fixed_minor,
            fee_rates.effective_at
        from surety.fee_rates
        where
            fee_rates.merchant_id = merchants.id and fee_rates.currency = currencies.currency
            and fee_rates.effective_at <= p_at
            and not exists (
                select from surety.fee_rate_withdrawals
                where
                    fee_rate_withdrawals.merchant_id = fee_rates.merchant_id
                    and fee_rate_withdrawals.currency = fee_rates.currency
                    and fee_rate_withdrawals.effective_at = fee_rates.effective_at
            )
        order by fee_rates.effective_at desc
        limit 1
    ) as agreed on true
    where merchants.id = p_merchant_id and currencies.currency = p_currency;
end;

comment on function surety.fee_terms(text, text, timestamptz) is
'Our fee for payments that are accepted at p_at: basis points of the amount, and a fixed part in minor units.
effective_at is null for the rate that a merchant begins with.';

create or replace function surety.settled_amounts(p_payment surety.payments)
returns table (exchanged boolean, currency text, net bigint, other_currency text, other_net bigint)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- If the capture has posted, its fee counts.
    with owed as (
        select
            p_payment.captured_minor - coalesce(
                (
                    select coalesce(sum(transfers.amount_minor), 0)
                    from ledger.postings
                    left join ledger.transfers
                        on postings.id = transfers.posting_id and transfers.credit_account like 'fee\_revenue:%'
                    where
                        postings.payment_id = p_payment.id and postings.rule in ('captured', 'captured_ach')
                    group by postings.payment_id
                ),
                (
                    select ledger.platform_fee(p_payment.captured_minor, terms.basis_points, terms.fixed_minor)
                    from surety.fee_terms(p_payment.merchant_id, p_payment.currency, p_payment.created_at) as terms
                )
            )::bigint as net
    )

    select
        exchange.currency is not null,
        coalesce(exchange.currency, p_payment.currency),
        case when exchange.currency is null then owed.net else round(owed.net * exchange.rate)::bigint end,
        p_payment.currency,
        owed.net
    from owed
    left join surety.charge_exchange_rate(p_payment.id) as exchange on true;
end;

comment on function surety.settled_amounts(surety.payments) is
'The amount owed to the merchant for a settled payment after our fee, in minor units: net in the currency that arrived,
other_net in the payment''s. exchanged says whether they differ. One row.';

create or replace function surety.missing_dispute_postings(p_payment_id text, p_object_id text)
returns table (n bigint, rule text, amount_minor bigint)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- held: withdrawn and not decided. lost: kept by the network. A dispute can go back and forth (lost, appealed, won,
    -- lost in part), so the transfers are the difference between the last fetch and what was posted so far.
    with fetched as (
        select
            case when facts.kind = 'dispute_opened' then facts.amount_minor else 0 end as held,
            case when facts.kind = 'dispute_lost' then facts.amount_minor else 0 end as lost
        from surety.facts
        where
            facts.payment_id = p_payment_id and facts.object_id = p_object_id and facts.kind like 'dispute\_%'
            and facts.disregarded is null
        order by facts.revision desc
        limit 1
    ),

    posted as (
        select
            count(distinct postings.id) as postings,
            coalesce(sum(case postings.rule
                when 'dispute_opened' then transfers.amount_minor
                when 'dispute_appealed' then transfers.amount_minor
                when 'dispute_won' then -transfers.amount_minor
                when 'dispute_lost' then -transfers.amount_minor
                else 0
            end), 0)::bigint as held,
            coalesce(sum(case postings.rule
                when 'dispute_lost' then transfers.amount_minor
                when 'dispute_appealed' then -transfers.amount_minor
                when 'dispute_reinstated' then -transfers.amount_minor
                else 0
            end), 0)::bigint as lost
        from ledger.postings
        inner join ledger.transfers on postings.id = transfers.posting_id
        where
            postings.payment_id = p_payment_id and postings.cause like p_object_id || ':%'
            and postings.rule like 'dispute\_%'
    ),

    steps as (
        select
            posted.postings,
            greatest(0, fetched.held + fetched.lost - posted.held - posted.lost) as opened,
            greatest(0, fetched.lost - posted.lost) as lost,
            least(greatest(0, posted.lost - fetched.lost), greatest(0, fetched.held - posted.held)) as appealed,
            posted.held,
            posted.lost as lost_before,
            fetched.held as held_after,
            fetched.lost as lost_after
        from fetched cross join posted
    ),

    moves as (
        select
            steps.postings,
            made.place,
            made.rule,
            made.amount_minor
        from steps
        cross join lateral (
            values
            (1, 'dispute_opened', steps.opened),
            (2, 'dispute_lost', steps.lost),
            (3, 'dispute_appealed', steps.appealed),
            (4, 'dispute_reinstated', greatest(0, steps.lost_before - steps.lost_after) - steps.appealed),
            (5, 'dispute_won', steps.held + steps.opened - steps.lost + steps.appealed - steps.held_after)
        ) as made (place, rule, amount_minor)
        where made.amount_minor > 0
    )

    select
        moves.postings + row_number() over (order by moves.place),
        moves.rule,
        moves.amount_minor
    from moves;
end;

comment on function surety.missing_dispute_postings(text, text) is
'The postings that bring the merchant''s balances in line with a dispute''s last fetch: rules with amounts in minor
units, numbered after those already posted. No row if the balances agree.';

create or replace function surety.post_facts(p_facts surety.facts[], p_derived surety.derived[], p_at timestamptz)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- One common table expression per kind of cause, each a set of entries.
declare
    v_entries ledger.entry [];
    v_new text [] := array(select f.id from unnest(p_facts) as f);
    -- These bounds exclude partitions before the statement begins.
    v_first_payment text;
    v_last_payment text;
begin
    select min(given.payment_id collate "C"), max(given.payment_id collate "C")
    into v_first_payment, v_last_payment
    from (
        select f.payment_id from unnest(p_facts) as f
        union all
        select d.payment_id from unnest(p_derived) as d
    ) as given;
    with facts as (
        select
            f.id, f.provider, f.account, f.object_id, f.kind, f.revision, f.amount_minor, f.currency, f.data,
            p.id as payment_id, p.merchant_id, p.amount_minor as asked_minor, p.captured_minor,
            f.provider || '/' || f.account as provider_owner, p.currency as asked_currency, p.created_at
        from unnest(p_facts) as f
        join surety.payments as p on p.id = f.payment_id and p.id between v_first_payment and v_last_payment
        where f.disregarded is null
    ),
    -- The merchant is owed the sum of all captures, up to the amount asked for. An excess goes to suspense.
    captures as (
        select ledger.entry(
            p_cause => f.object_id || ':captured',
            p_rule => case f.provider when 'bank' then 'captured_ach' else 'captured' end,
            p_payment_id => f.payment_id, p_merchant_id => f.merchant_id, p_provider_owner => f.provider_owner,
            p_currency => f.currency,
            p_gross => owed.after - owed.before,
            p_platform_fee => ledger.platform_fee(owed.after, t.basis_points, t.fixed_minor)
                - ledger.platform_fee(owed.before, t.basis_points, t.fixed_minor),
            p_excess => f.amount_minor - owed.after + owed.before) as entry
        from facts as f
        cross join lateral (
            select
                least(f.asked_minor, coalesce(
                    sum(k.amount_minor) filter (where k.id < f.id or k.id <> all(v_new)), 0)::bigint) as before,
                least(f.asked_minor, coalesce(
                    sum(k.amount_minor) filter (where k.id <= f.id or k.id <> all(v_new)), 0)::bigint) as after
            from surety.facts as k
            where k.payment_id = f.payment_id and k.payment_id between v_first_payment and v_last_payment
                and k.kind = 'captured' and k.disregarded is null
        ) as owed
        cross join lateral surety.fee_terms(f.merchant_id, f.asked_currency, f.created_at) as t
        where f.kind = 'captured'
    ),
    balance_transactions as (
        select ledger.entry(
            p_cause => f.object_id,
            p_rule => surety.posting_rule(f.provider, f.data ->> 'category', f.data ? 'other_currency'),
            p_payment_id => f.payment_id, p_merchant_id => f.merchant_id, p_provider_owner => f.provider_owner,
            p_currency => f.currency, p_gross => f.amount_minor, p_fee => (f.data ->> 'fee')::bigint,
            p_net => (f.data ->> 'net')::bigint, p_other_currency => f.data ->> 'other_currency',
            p_other_gross => (f.data ->> 'other_gross')::bigint) as entry
        from facts as f
        where f.kind = 'money'
    ),
    -- Any fact about a refund proves its request. Causes carry our id, because a refund is reserved here before the
    -- provider has it. If the refunded amount differs from the requested one, the difference is another cause.
    refunds_asked as (
        select ledger.entry(
            p_cause => r.id || ':asked' || case when asked.minor is null then '' else ':' || r.amount_minor end,
            p_rule => 'refund_asked',
            p_payment_id => f.payment_id, p_merchant_id => f.merchant_id, p_provider_owner => f.provider_owner,
            p_currency => f.currency, p_gross => r.amount_minor - coalesce(asked.minor, 0)) as entry
        from facts as f
        join surety.refunds as r on r.provider = f.provider and r.provider_account = f.account
            and r.provider_id = f.object_id
        cross join lateral (
            select sum(case when t.credit_account like 'reserved\_for\_refunds:%' then t.amount_minor
                else - t.amount_minor end)::bigint as minor
            from ledger.postings as g join ledger.transfers as t on t.posting_id = g.id
            where g.payment_id = r.payment_id and g.rule = 'refund_asked' and g.cause like r.id || ':asked%'
        ) as asked
        where f.kind like 'refund\_%' and asked.minor is distinct from r.amount_minor
    ),
    refunds_failed as (
        select ledger.entry(
            p_cause => r.id || ':failed', p_rule => 'refund_failed',
            p_payment_id => f.payment_id, p_merchant_id => f.merchant_id, p_provider_owner => f.provider_owner,
            p_currency => f.currency, p_gross => r.amount_minor) as entry
        from facts as f
        join surety.refunds as r on r.provider = f.provider and r.provider_account = f.account
            and r.provider_id = f.object_id
        where f.kind in ('refund_failed', 'refund_canceled')
    ),
    disputes as (
        select ledger.entry(
            p_cause => f.object_id || ':' || moved.n || ':' || moved.rule, p_rule => moved.rule,
            p_payment_id => f.payment_id, p_merchant_id => f.merchant_id, p_provider_owner => f.provider_owner,
            p_currency => f.currency, p_gross => moved.amount_minor) as entry
        from (
            select distinct on (g.object_id) g.* from facts as g where g.kind like 'dispute\_%'
            order by g.object_id, g.revision desc
        ) as f
        cross join lateral surety.missing_dispute_postings(f.payment_id, f.object_id) as moved
    ),
    -- A return takes the amount back from the merchant. The capture's fact may come after the return's, so a new fact
    -- about either selects all returns of the payment. A return that has posted does not post again.
    returns as (
        select ledger.entry(
            p_cause => k.object_id || ':' || k.kind,
            p_rule => case k.provider when 'bank' then 'return_ach' else 'return' end,
            p_payment_id => f.payment_id, p_merchant_id => f.merchant_id,
            p_provider_owner => k.provider || '/' || k.account, p_currency => k.currency,
            p_gross => case k.kind when 'dishonored' then - k.amount_minor else k.amount_minor end) as entry
        from (
            select distinct g.payment_id, g.merchant_id from facts as g
            where g.kind in ('captured', 'returned', 'dishonored', 'contested') and g.captured_minor > 0
        ) as f
        join surety.facts as k
            on k.payment_id = f.payment_id and k.payment_id between v_first_payment and v_last_payment
        where k.kind in ('returned', 'dishonored', 'contested') and k.disregarded is null
    ),
    settlements as (
        select ledger.entry(
            p_cause => d.payment_id || ':settled',
            p_rule => case when s.exchanged then 'settled_exchanged' else 'settled' end,
            p_payment_id => p.id, p_merchant_id => p.merchant_id,
            p_provider_owner => p.provider || '/' || p.provider_account, p_currency => s.currency, p_net => s.net,
            p_other_currency => s.other_currency, p_other_net => s.other_net) as entry
        from unnest(p_derived) as d
        join surety.payments as p on p.id = d.payment_id and p.id between v_first_payment and v_last_payment
        cross join lateral surety.settled_amounts(p) as s
        where d.is_settled
    ),
    -- A money fact with the wrong currency or account is real money, so it is posted. A fact of the other mode is not.
    mismatched_money as (
        select ledger.entry(
            p_cause => f.object_id, p_rule => surety.posting_rule(f.provider, 'foreign', false),
            p_payment_id => f.payment_id, p_provider_owner => f.provider || '/' || f.account,
            p_currency => f.currency, p_gross => f.amount_minor, p_fee => (f.data ->> 'fee')::bigint,
            p_net => (f.data ->> 'net')::bigint) as entry
        from unnest(p_facts) as f
        where f.kind = 'money' and f.disregarded in ('currency', 'account')
    ),
    causes as (
        select c.entry from captures as c
        union all select b.entry from balance_transactions as b
        union all select r.entry from refunds_asked as r
        union all select r.entry from refunds_failed as r
        union all select d.entry from disputes as d
        union all select r.entry from returns as r
        union all select s.entry from settlements as s
        union all select m.entry from mismatched_money as m
    )
    select array_agg(c.entry order by (c.entry).cause) into v_entries from causes as c;
    perform surety.open_discrepancy(
        'category', f.object_id, 'warning', format('a balance transaction of category %s', f.data ->> 'category'),
        jsonb_build_array(
            surety.differing_value('category', null, f.data ->> 'category'),
            surety.differing_amount('amount', null, f.amount_minor)),
        null, f.id, p_at, p_payment_id => f.payment_id, p_currency => f.currency, p_data => to_jsonb(f))
    from unnest(p_facts) as f
    where f.kind = 'money' and f.disregarded is null
        and surety.posting_rule(f.provider, f.data ->> 'category', false) like 'foreign%'
    order by f.object_id;
    if v_entries is not null then
        perform ledger.post(v_entries, p_at);
    end if;
end;
$$;

comment on function surety.post_facts(surety.facts[], surety.derived[], timestamptz) is
'Posts the entries of new facts and of the states derived from them. The facts are stored, their payments locked
and advanced. A balance transaction of an unknown category goes to suspense and opens a discrepancy. Call it last in a
transaction.';
