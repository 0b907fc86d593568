-- Circuits of provider accounts: their keys, their times, and whether all of them are open.

create or replace view surety.open_circuits as
select
    circuit_breakers.provider,
    circuit_breakers.account
from surety.circuit_breakers
where circuit_breakers.opened_at is not null;

comment on view surety.open_circuits is
'The accounts that only probes may call. A view, so that the planner inlines it in queries that claim due objects.';

create or replace function surety.circuit_key(p_provider text, p_account text) returns text
language sql immutable
begin atomic
    select p_provider || ':' || p_account;
end;

comment on function surety.circuit_key(text, text) is
'The key of an account''s circuit, as in outbox.retries.blocked_by: provider:account.';

create or replace function surety.probe_delay(p_probes integer, p_cause text) returns interval
language sql immutable
begin atomic
    -- Many merchants may stay cut off for ever.
    select least(
        case p_cause when 'account_refused' then interval '5 minutes' else interval '1 minute' end,
        interval '5 seconds' * 2 ^ least(p_probes, 10)
    );
end;

comment on function surety.probe_delay(integer, text) is
'The time until the next probe of a circuit that is open for p_cause: 5 seconds, doubled by each probe, at most a
minute; for a refused account at most five minutes.';

create or replace function surety.hold_duration() returns interval
language sql immutable
begin atomic
    select interval '10 minutes';
end;

comment on function surety.hold_duration() is
'How long an event is held for an open circuit, and then again. When the circuit closes, held events are due at once.';

create or replace function surety.all_accounts_unreachable() returns boolean
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        exists (select from surety.open_circuits)
        and not exists (
            select from surety.merchants
            where not exists (
                select from surety.open_circuits where open_circuits.account = merchants.provider_account
            )
        );
end;

comment on function surety.all_accounts_unreachable() is
'Whether the circuits of all merchants'' accounts are open, so that handlers that call the provider claim nothing.';

create or replace function surety.refusal_grace() returns interval
language sql immutable parallel safe
begin atomic
    select interval '5 minutes';
end;

comment on function surety.refusal_grace() is
'How long the provider must have refused a merchant''s account until new payments of the merchant are refused. A shorter
interruption only delays them.';

create or replace function surety.refused_payment_lifetime() returns interval
language sql immutable parallel safe
begin atomic
    select interval '24 hours';
end;

comment on function surety.refused_payment_lifetime() is
'How long a payment waits for an account that the provider refuses. Then it fails, if the provider surely has not
executed it, and its reference is free.';

create or replace function surety.cut_off_accounts() returns text[]
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(array_agg(circuit_breakers.account), '{}')
    from surety.circuit_breakers
    where
        circuit_breakers.provider = 'stripe' and circuit_breakers.cause = 'account_refused'
        and circuit_breakers.opened_at <= surety.time_now() - surety.refusal_grace();
end;

comment on function surety.cut_off_accounts() is
'The accounts that the provider has refused for longer than surety.refusal_grace().';
