-- The circuits of a provider's accounts: their keys, their times, and whether all of them are open.

create or replace function surety.circuit_key(p_provider text, p_account text) returns text
language sql immutable
begin atomic
    select p_provider || ':' || p_account;
end;

create or replace function surety.probe_delay(p_probes integer) returns interval
language sql immutable
begin atomic
    select least(interval '1 minute', interval '5 seconds' * 2 ^ least(p_probes, 10));
end;

create or replace function surety.hold_duration(p_opened_at timestamptz, p_now timestamptz) returns interval
language sql immutable
begin atomic
    -- Closing wakes what is held; this is the net below, and lets a long outage cost little.
    select least(interval '1 hour', greatest(interval '1 minute', p_now - p_opened_at));
end;

create or replace function surety.all_accounts_unreachable() returns boolean
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- Whether no merchant's account can be reached, so that there is nothing to claim.
    select
        exists (select from surety.circuit_breakers where circuit_breakers.opened_at is not null)
        and not exists (
            select from surety.merchants
            where not exists (
                select from surety.circuit_breakers
                where circuit_breakers.account = merchants.provider_account and circuit_breakers.opened_at is not null
            )
        );
end;
