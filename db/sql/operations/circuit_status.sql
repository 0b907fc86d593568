-- The state of each provider account's circuit, and the refusals of our access.

create or replace function surety.circuit_status()
returns table (
    provider text, account text, state text, error_share double precision, opened_at timestamptz,
    next_probe_at timestamptz, held bigint, reason text
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        circuit_breakers.provider,
        circuit_breakers.account,
        case
            when circuit_breakers.opened_at is null then 'healthy'
            when circuit_breakers.cause = 'outage' then 'unreachable'
            else 'refused'
        end,
        (circuit_breakers.failed + circuit_breakers.prior_failed)::double precision
        / nullif(
            circuit_breakers.failed + circuit_breakers.prior_failed
            + circuit_breakers.answered + circuit_breakers.prior_answered,
            0
        ),
        circuit_breakers.opened_at,
        circuit_breakers.next_probe_at,
        (
            select count(*)
            from outbox.retries
            where
                retries.blocked_by = surety.circuit_key(circuit_breakers.provider, circuit_breakers.account)
                and circuit_breakers.opened_at is not null
        ),
        case when circuit_breakers.opened_at is not null then circuit_breakers.reason end
    from surety.circuit_breakers
    order by circuit_breakers.provider, circuit_breakers.account;
end;

comment on function surety.circuit_status() is
'The circuit of each account that was called: its state (healthy: closed; unreachable: open by an outage; refused: open
by a refusal of our access), the share of failed calls within the last minute of calls (null without calls), the time of
the next probe (null: the platform''s account is probed for it), and the number of held events.';

create or replace function surety.list_refused_accounts()
returns table (
    provider text, account text, is_key boolean, merchants text[], reason text, seconds double precision, held bigint
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- The key is one row, whatever the number of accounts.
    select
        circuit_breakers.provider,
        circuit_breakers.account,
        circuit_breakers.cause = 'key_refused',
        named.merchants,
        circuit_breakers.reason,
        extract(epoch from surety.time_now() - circuit_breakers.opened_at)::double precision,
        (
            select count(*)
            from surety.circuit_breakers as alike
            inner join outbox.retries on retries.blocked_by = surety.circuit_key(alike.provider, alike.account)
            where
                alike.provider = circuit_breakers.provider and alike.cause = circuit_breakers.cause
                and (alike.account = circuit_breakers.account or alike.cause = 'key_refused')
        )
    from surety.circuit_breakers
    cross join lateral (
        select array_agg(merchants.name order by merchants.name) as merchants
        from surety.merchants
        where merchants.provider_account = circuit_breakers.account and merchants.suspended_at is null
    ) as named
    where
        (circuit_breakers.cause = 'key_refused' and circuit_breakers.account = '')
        or (circuit_breakers.cause = 'account_refused' and named.merchants is not null)
    order by circuit_breakers.cause desc, circuit_breakers.opened_at asc, circuit_breakers.account asc;
end;

comment on function surety.list_refused_accounts() is
'The refusals of our access: our key (is_key, one row), and each refused account that merchants have, without suspended
ones; with the provider''s words, the seconds since then and the number of held events.';
