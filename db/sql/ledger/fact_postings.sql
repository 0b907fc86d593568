-- What new facts mean for the ledger: each cause with its rule and amounts, for ledger.post.
--
-- An ACH payment is carried by a bank or by Stripe: who tells of it, the fact's provider, decides which accounts its
-- money goes through, bank and ach_clearing or provider_balance and provider_receivable.

create or replace function surety.post_facts(p_facts surety.facts[], p_derived surety.derived[], p_at timestamptz)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- The ledger's consequences of new facts. Status moves merchants' balances; only balance transactions move the
-- provider's.
declare
    v_entries ledger.entry [];
    v_new text [] := array(select f.id from unnest(p_facts) as f);
begin
    with facts as (
        select
            f.id, f.provider, f.account, f.object_id, f.kind, f.revision, f.amount_minor, f.currency, f.data,
            p.id as payment_id, p.merchant_id, p.amount_minor as asked_minor, p.captured_minor,
            f.provider || '/' || f.account as provider_owner, m.fee_basis_points, m.fee_fixed_minor
        from unnest(p_facts) as f
        join surety.payments as p on p.id = f.payment_id
        join surety.merchants as m on m.id = p.merchant_id
        where f.disregarded is null
    ),
    causes as (
        -- What is captured in all, up to the amount asked for, is the merchant's; any more is nobody's yet.
        select
            f.object_id || ':captured' as cause,
            case f.provider when 'bank' then 'captured_ach' else 'captured' end as rule, f.payment_id, f.merchant_id,
            f.provider_owner, f.currency, least(f.asked_minor, c.up_to) - least(f.asked_minor, c.before) as gross,
            null::bigint as fee, null::bigint as net,
            ledger.fee(least(f.asked_minor, c.up_to), f.fee_basis_points, f.fee_fixed_minor)
            - ledger.fee(least(f.asked_minor, c.before), f.fee_basis_points, f.fee_fixed_minor) as platform_fee,
            f.amount_minor - least(f.asked_minor, c.up_to) + least(f.asked_minor, c.before) as excess,
            null::text as other_currency, null::bigint as other_gross, null::bigint as other_net
        from facts as f
        cross join lateral (
            select
                coalesce(sum(k.amount_minor) filter (where k.id < f.id or k.id <> all(v_new)), 0)::bigint as before,
                coalesce(sum(k.amount_minor) filter (where k.id <= f.id or k.id <> all(v_new)), 0)::bigint as up_to
            from surety.facts as k
            where k.payment_id = f.payment_id and k.kind = 'captured' and k.disregarded is null
        ) as c
        where f.kind = 'captured'
        union all
        select
            f.object_id, r.rule, f.payment_id, f.merchant_id, f.provider_owner, f.currency, f.amount_minor,
            (f.data ->> 'fee')::bigint, (f.data ->> 'net')::bigint, null, null,
            f.data ->> 'other_currency', (f.data ->> 'other_gross')::bigint, null
        from facts as f
        cross join lateral (
            select surety.posting_rule(f.provider, f.data ->> 'category', f.data ? 'other_currency') as rule
        ) as r
        where f.kind = 'money'
        union all
        -- Any news of a refund means that it was asked for. Its causes are named by our id, for it is asked for here
        -- before the provider knows of it; if another amount was refunded than was asked for, the rest follows.
        select
            r.id || ':asked' || case when asked.minor is null then '' else ':' || r.amount_minor end, 'refund_asked',
            f.payment_id, f.merchant_id, f.provider_owner, f.currency, r.amount_minor - coalesce(asked.minor, 0), null,
            null, null,
            null, null, null, null
        from facts as f
        join surety.refunds as r on r.provider = f.provider and r.provider_account = f.account
            and r.provider_id = f.object_id
        cross join lateral (
            select sum(case when t.credit_account like 'reserved\_for\_refunds:%' then t.amount_minor
                else - t.amount_minor end)
                as minor
            from ledger.postings as g join ledger.transfers as t on t.posting_id = g.id
            where g.payment_id = r.payment_id and g.rule = 'refund_asked' and g.cause like r.id || ':asked%'
        ) as asked
        where f.kind like 'refund\_%' and asked.minor is distinct from r.amount_minor
        union all
        select
            r.id || ':failed', 'refund_failed', f.payment_id, f.merchant_id, f.provider_owner, f.currency,
            r.amount_minor, null, null, null, null, null, null, null
        from facts as f
        join surety.refunds as r on r.provider = f.provider and r.provider_account = f.account
            and r.provider_id = f.object_id
        where f.kind in ('refund_failed', 'refund_canceled')
        union all
        select
            f.object_id || ':' || moved.n || ':' || moved.rule, moved.rule, f.payment_id, f.merchant_id,
            f.provider_owner, f.currency, moved.amount_minor, null, null, null, null, null, null, null
        from (
            select distinct on (g.object_id) g.* from facts as g where g.kind like 'dispute\_%'
            order by g.object_id, g.revision desc
        ) as f
        cross join lateral surety.dispute_transfers(f.payment_id, f.object_id) as moved
        union all
        -- The merchant gives back what he was owed. That may be known later than that it came back, so news of either
        -- tells of all returns; those that have posted don't post again.
        select
            k.object_id || ':' || k.kind, case k.provider when 'bank' then 'return_ach' else 'return' end,
            f.payment_id, f.merchant_id, k.provider || '/' || k.account, k.currency,
            case k.kind when 'dishonored' then - k.amount_minor else k.amount_minor end,
            null, null, null, null, null, null, null
        from (
            select distinct g.payment_id, g.merchant_id from facts as g
            where g.kind in ('captured', 'returned', 'dishonored', 'contested') and g.captured_minor > 0
        ) as f
        join surety.facts as k on k.payment_id = f.payment_id
        where k.kind in ('returned', 'dishonored', 'contested') and k.disregarded is null
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
            f.object_id, surety.posting_rule(f.provider, 'foreign', false), f.payment_id, null,
            f.provider || '/' || f.account, f.currency, f.amount_minor, (f.data ->> 'fee')::bigint,
            (f.data ->> 'net')::bigint, null, null, null, null, null
        from unnest(p_facts) as f
        where f.kind = 'money' and f.disregarded in ('currency', 'account')
    )
    select array_agg((
        c.cause, c.rule, c.payment_id, c.merchant_id, c.provider_owner, c.currency, c.gross, c.fee, c.net,
            c.platform_fee,
        c.excess, c.other_currency, c.other_gross, c.other_net
    )::ledger.entry order by c.cause) into v_entries
    from causes as c;
    perform surety.open_discrepancy(
        'category', f.object_id, f.payment_id, format('a balance transaction of category %s', f.data ->> 'category'),
        to_jsonb(f), false, p_at)
    from unnest(p_facts) as f
    where f.kind = 'money' and f.disregarded is null
        and surety.posting_rule(f.provider, f.data ->> 'category', false) like 'foreign%';
    if v_entries is not null then
        perform ledger.post(v_entries, p_at);
    end if;
end;
$$;

create or replace function surety.posting_rule(p_provider text, p_category text, p_is_exchanged boolean) returns text
language sql immutable parallel safe
begin atomic
    -- Whatever we have no rule for goes to suspense, so that no money stays unbooked. What is refunded or disputed is
    -- on its way or held in the payment's currency; where it was exchanged, the merchant pays it in the other, at the
    -- rate of that day.
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

create or replace function surety.charge_exchange_rate(p_payment_id text) returns table (currency text, rate numeric)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- In which currency its charge arrived, if not in its own, and at what rate; refunds and disputes have others.
    select
        facts.currency,
        (facts.data ->> 'rate')::numeric
    from surety.facts
    where
        facts.payment_id = p_payment_id and facts.kind = 'money' and facts.data ? 'other_currency'
        and facts.data ->> 'category' = 'charge' and facts.disregarded is null
    order by facts.object_id
    limit 1;
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
                        on postings.id = transfers.posting_id and transfers.credit_account like 'fee\_revenue:%'
                    where
                        postings.payment_id = p_payment.id and postings.rule in ('captured', 'captured_ach')
                    group by postings.payment_id
                ),
                ledger.fee(p_payment.captured_minor, p_merchant.fee_basis_points, p_merchant.fee_fixed_minor)
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

create or replace function surety.dispute_transfers(p_payment_id text, p_object_id text)
returns table (n bigint, rule text, amount_minor bigint)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- What must be posted so that the merchant's balances stand as the dispute's last fetch says: how much is held back
    -- (held), how much is lost. A dispute can go back and forth (lost, appealed, won, lost in part), so this looks at
    -- what was posted so far.
    with told as (
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
            greatest(0, told.held + told.lost - posted.held - posted.lost) as opened,
            greatest(0, told.lost - posted.lost) as lost,
            least(greatest(0, posted.lost - told.lost), greatest(0, told.held - posted.held)) as appealed,
            posted.held,
            posted.lost as lost_before,
            told.held as held_after,
            told.lost as lost_after
        from told cross join posted
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
