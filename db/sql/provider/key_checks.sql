-- The provider's key: what the last check of it found (jobs/stripe/key_check.py). The key itself is never stored.

create or replace function surety.accounts_to_check(p_provider text)
returns table (account text, takes_payments boolean)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        accounts.account,
        accounts.takes_payments
    from (
        select
            '' as account,
            count(*) = 0 or count(*) filter (where merchants.provider_account = '') > 0 as takes_payments
        from surety.merchants
        union all
        select
            min(merchants.provider_account),
            true
        from surety.merchants
        where
            merchants.provider_account <> '' and merchants.suspended_at is null
            and not exists (
                select from surety.open_circuits
                where open_circuits.provider = p_provider and open_circuits.account = merchants.provider_account
            )
    ) as accounts
    where
        accounts.account is not null
        and not exists (
            select from surety.open_circuits
            where open_circuits.provider = p_provider and open_circuits.account = accounts.account
        )
    order by accounts.account;
end;

comment on function surety.accounts_to_check(text) is
'The accounts at which a key''s permissions are checked: the platform''s own (empty), which is always read and takes
payments unless every merchant has an account of its own; and one connected account, because a key has the same
permissions at all of them. None behind an open circuit.';

create or replace function surety.key_check_is_due(p_provider text, p_key_digest text) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select not exists (
        select from surety.provider_keys
        where
            provider_keys.provider = p_provider and provider_keys.key_digest = p_key_digest
            and provider_keys.error is null
            and provider_keys.checked_at > surety.time_now() - interval '9 minutes 30 seconds'
    );
end;

comment on function surety.key_check_is_due(text, text) is
'Whether a worker''s key is to be checked: the last check was of another key, could not be finished, or is older than
9:30 minutes, so that a question each minute makes a check every ten.';

create or replace function surety.record_key_check(
    p_provider text, p_livemode boolean, p_is_restricted boolean, p_account_id text, p_missing_permissions text[],
    p_key_digest text default null
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.provider_keys as known (
        provider, livemode, is_restricted, key_digest, account_id, missing_permissions, missing_since, checked_at
    )
    values (
        p_provider, p_livemode, p_is_restricted, p_key_digest, p_account_id, p_missing_permissions,
        case when p_missing_permissions <> '{}' then surety.time_now() end,
        surety.time_now()
    )
    on conflict (provider) do update
    set
        livemode = excluded.livemode,
        is_restricted = excluded.is_restricted,
        key_digest = excluded.key_digest,
        account_id = case
            when exists (select from surety.merchants) then coalesce(known.account_id, excluded.account_id)
            else excluded.account_id
        end,
        other_account_id = case
            when exists (select from surety.merchants) then nullif(excluded.account_id, known.account_id)
        end,
        missing_permissions = excluded.missing_permissions,
        missing_since = case
            when excluded.missing_permissions <> '{}' then coalesce(known.missing_since, excluded.missing_since)
        end,
        checked_at = excluded.checked_at,
        error = null;
end;

comment on function surety.record_key_check(text, boolean, boolean, text, text[], text) is
'Records a finished check of a provider''s key. p_account_id is the account of the key, null if the provider does not
name it. Once there is a merchant, the platform''s own account stays, and another one is recorded apart.
p_missing_permissions are those that the key should have.';

create or replace function surety.note_failed_key_check(
    p_provider text, p_livemode boolean, p_is_restricted boolean, p_error text, p_key_digest text
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.provider_keys as known (provider, livemode, is_restricted, error, key_digest)
    values (p_provider, p_livemode, p_is_restricted, left(p_error, 500), p_key_digest)
    on conflict (provider) do update
    set
        livemode = excluded.livemode,
        is_restricted = excluded.is_restricted,
        key_digest = excluded.key_digest,
        other_account_id = case when known.key_digest = excluded.key_digest then known.other_account_id end,
        missing_permissions = case
            when known.key_digest = excluded.key_digest then known.missing_permissions else '{}'
        end,
        missing_since = case when known.key_digest = excluded.key_digest then known.missing_since end,
        checked_at = case when known.key_digest = excluded.key_digest then known.checked_at end,
        error = excluded.error;
end;

comment on function surety.note_failed_key_check(text, boolean, boolean, text, text) is
'Notes that a check of a provider''s key could not be finished. What the last finished one found stays, unless that was
another key; then only the platform''s own account stays.';

create or replace function surety.list_provider_keys()
returns table (
    provider text, livemode boolean, is_restricted boolean, account_id text, other_account_id text,
    checked_seconds double precision,
    missing_permissions text[], missing_seconds double precision, error text, merchant_on_own_account text
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        provider_keys.provider,
        provider_keys.livemode,
        provider_keys.is_restricted,
        provider_keys.account_id,
        provider_keys.other_account_id,
        extract(epoch from surety.time_now() - provider_keys.checked_at)::double precision,
        provider_keys.missing_permissions,
        extract(epoch from surety.time_now() - provider_keys.missing_since)::double precision,
        provider_keys.error,
        merchants.id
    from surety.provider_keys
    left join surety.merchants
        on merchants.provider_account in (provider_keys.account_id, provider_keys.other_account_id)
    order by provider_keys.provider;
end;

comment on function surety.list_provider_keys() is
'What the last checks of the providers'' keys found. merchant_on_own_account: the merchant that has the platform''s own
account as its own, so that its money is booked twice.';

create or replace function surety.require_merchants_account(p_account text) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from surety.provider_keys as k where p_account in (k.account_id, k.other_account_id)) then
        raise exception '% is the platform''s own account', p_account using
            errcode = 'check_violation', schema = 'surety', table = 'merchants',
            constraint = 'merchant_has_no_account_of_the_platform',
            hint = 'A merchant on the platform''s account is added without an account.';
    end if;
    return p_account;
end;
$$;

comment on function surety.require_merchants_account(text) is
'A merchant''s account at the provider. Violates merchant_has_no_account_of_the_platform if it is the platform''s own:
one account under two names would book its money twice.';
