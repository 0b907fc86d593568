-- Unmatched facts: those whose payment is not known yet, foreign ones, and payouts and fees, which have no payment.

create or replace function surety.fact_has_no_payment(p_fact jsonb) returns boolean
language sql immutable parallel safe
begin atomic
    select coalesce(
        p_fact ->> 'kind' in ('payout', 'payout_failed')
        or p_fact -> 'data' ->> 'category' in (
            'payout', 'payout_reversal', 'bank_line', 'fee', 'tax', 'network_cost', 'risk_reserved_funds'
        ),
        false
    );
end;

comment on function surety.fact_has_no_payment(jsonb) is
'Whether a fact belongs to no payment by its kind or category: payouts, bank lines, the provider''s own fees.';

create or replace function surety.entry_without_payment(p_fact jsonb, p_rule text) returns ledger.entry
language sql immutable parallel safe
begin atomic
    select ledger.entry(
        p_cause => p_fact ->> 'object_id', p_rule => p_rule,
        p_provider_owner => (p_fact ->> 'provider') || '/' || (p_fact ->> 'account'),
        p_currency => p_fact ->> 'currency', p_gross => (p_fact ->> 'amount_minor')::bigint,
        p_fee => (p_fact -> 'data' ->> 'fee')::bigint, p_net => (p_fact -> 'data' ->> 'net')::bigint
    );
end;

comment on function surety.entry_without_payment(jsonb, text) is
'The ledger entry of a balance transaction that belongs to no payment, by the rule given.';

create or replace function surety.store_unmatched_facts(p_facts jsonb, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_entries ledger.entry [];
begin
    perform surety.record_payouts(p_facts, p_at);
    with stored as (
        insert into surety.unmatched_facts (
            id, provider, account, livemode, object_id, kind, revision, fact, recorded_at, ended_at, ended_as
        )
        select
            surety.new_id('umf', p_at), f.fact ->> 'provider', f.fact ->> 'account', (f.fact ->> 'livemode')::boolean,
            f.fact ->> 'object_id', f.fact ->> 'kind', coalesce((f.fact ->> 'revision')::integer, 0), f.fact, p_at,
            case when k.has_no_payment then p_at end, case when k.has_no_payment then 'without_payment' end
        from jsonb_array_elements(p_facts) as f (fact)
        cross join lateral (select surety.fact_has_no_payment(f.fact) as has_no_payment) as k
        order by 2, 3, 4, 5, 6, 7
        on conflict (provider, account, livemode, object_id, kind, revision) do nothing
        returning *
    )
    select array_agg(surety.entry_without_payment(
        k.fact, surety.posting_rule(k.provider, k.fact -> 'data' ->> 'category', false)) order by k.object_id)
    into v_entries
    from stored as k where k.ended_as = 'without_payment' and k.kind = 'money';
    if v_entries is not null then
        perform ledger.post(v_entries, p_at);
    end if;
end;
$$;

comment on function surety.store_unmatched_facts(jsonb, timestamptz) is
'Stores facts that match no payment, once each. Those that have none by nature are booked at once; the others wait for
retry_unmatched_facts. A payout is recorded each time it is reported: its status and trace id change.';
