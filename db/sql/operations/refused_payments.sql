-- Payments that the provider refuses to create, by account: if most are refused, the fault is likely ours.

create or replace function surety.list_refused_payments()
returns table (
    provider text, account text, refused bigint, answered bigint, seconds double precision, payment_id text, error text
)
language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
begin atomic
    -- Ids sort by time, so the newest calls are found by the primary key, however many there are.
    with creations as materialized (
        select
            calls.payment_id,
            calls.status in (400, 404) as is_refused,
            calls.answered_at
        from surety.calls
        where
            calls.payment_id >= surety.id_at('pay', surety.time_now() - interval '15 minutes')
            and calls.operation = 'create' and calls.answered_at is not null and calls.status < 500
        order by calls.payment_id desc
        limit 2000
    )

    select
        payments.provider,
        payments.provider_account,
        count(*) filter (where creations.is_refused),
        count(*),
        extract(epoch from surety.time_now() - min(creations.answered_at) filter (where creations.is_refused))
            ::double precision,
        max(creations.payment_id) filter (where creations.is_refused),
        (array_agg(
            concat_ws(': ', payments.failure ->> 'code', payments.failure ->> 'message')
            order by creations.payment_id desc
        ) filter (where creations.is_refused))[1]
    from creations
    inner join surety.payments on creations.payment_id = payments.id
    group by payments.provider, payments.provider_account
    having
        count(*) filter (where creations.is_refused) >= 5
        and count(*) filter (where creations.is_refused) * 2 > count(*)
    order by count(*) filter (where creations.is_refused) desc, payments.provider_account;
end;

comment on function surety.list_refused_payments() is
'The accounts at which the provider refused (400, 404) five or more, and more than half, of the payments that were
accepted in the last 15 minutes, of the newest 2000 at most: how many of how many, since when, the newest one and its
failure. A single payment that is refused fails with the provider''s words and is no concern of operators.';
