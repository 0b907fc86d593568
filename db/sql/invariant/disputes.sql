-- Invariants of disputes: each dispute's row and postings match its last fetch from the provider.

create or replace view surety.last_dispute_fetches as
select distinct on (facts.provider, facts.account, facts.object_id)
    facts.provider,
    facts.account,
    facts.object_id,
    facts.payment_id,
    facts.revision,
    facts.kind,
    facts.amount_minor,
    facts.currency,
    surety.dispute_status(facts.kind, facts.data) as status,
    surety.dispute_withdrawn(facts.kind, facts.amount_minor) as withdrawn_minor
from surety.facts
where facts.kind like 'dispute\_%' and facts.disregarded is null
order by facts.provider asc, facts.account asc, facts.object_id asc, facts.revision desc;

comment on view surety.last_dispute_fetches is 'The last fact of each dispute at a provider.';

create or replace view invariant.disputes_match_last_fetch as
select coalesce(disputes.id, last_fetches.object_id) as subject
from surety.disputes
full join surety.last_dispute_fetches as last_fetches
    on
        disputes.provider = last_fetches.provider and disputes.provider_account = last_fetches.account
        and disputes.provider_id = last_fetches.object_id
where
    (disputes.payment_id, disputes.revision, disputes.status, disputes.withdrawn_minor) is distinct from (
        last_fetches.payment_id, last_fetches.revision, last_fetches.status, last_fetches.withdrawn_minor
    );

comment on view invariant.disputes_match_last_fetch is 'every dispute is as last fetched';

create or replace view invariant.dispute_postings_match_last_fetch as
select disputes.id as subject
from surety.disputes
where exists (select from surety.missing_dispute_postings(disputes.payment_id, disputes.provider_id));

comment on view invariant.dispute_postings_match_last_fetch is 'every dispute has posted what was last fetched';

create or replace view invariant.disputed_balances_match_disputes as
select sums.account_id as subject
from (
    select
        parts.account_id,
        sum(parts.amount_minor) as amount_minor
    from (
        select
            'disputed:' || payments.merchant_id || ':' || last_fetches.currency as account_id,
            last_fetches.amount_minor
        from surety.last_dispute_fetches as last_fetches
        inner join surety.payments on last_fetches.payment_id = payments.id
        where last_fetches.kind = 'dispute_opened'
        union all
        select
            balances.account_id,
            -balances.balance_minor
        from ledger.balances
        where balances.account_id like 'disputed:%'
    ) as parts
    group by parts.account_id
) as sums
where sums.amount_minor <> 0;

comment on view invariant.disputed_balances_match_disputes is 'every disputed balance is the sum of its open disputes';

create or replace view invariant.disputes_match_balance_transactions as
select disputes.id as subject
from surety.disputes
left join lateral (
    select
        coalesce(sum(coalesce((facts.data ->> 'other_gross')::bigint, facts.amount_minor)), 0) as amount_minor,
        max(facts.recorded_at) as recorded_at
    from surety.facts
    where
        facts.payment_id = disputes.payment_id and facts.kind = 'money' and facts.disregarded is null
        and facts.data ->> 'source' = disputes.provider_id
        and facts.data ->> 'category' in ('dispute', 'dispute_reversal')
) as moved on true
where
    -- The dispute and the money are read separately, so one may come later.
    greatest(disputes.updated_at, moved.recorded_at) < surety.read_clock() - interval '7 days'
    and greatest(0, -moved.amount_minor) <> disputes.withdrawn_minor;

comment on view invariant.disputes_match_balance_transactions is
'every dispute''s withdrawn amount is the sum of its balance transactions';
