-- Authentication: the merchant of a key.

create or replace function api.identify_merchant(p_key_hash bytea)
returns table (key_id text, merchant_id text, is_suspended boolean, provider_account text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        api_keys.id,
        merchants.id,
        merchants.suspended_at is not null,
        merchants.provider_account
    from surety.api_keys
    inner join surety.merchants on api_keys.merchant_id = merchants.id
    where api_keys.hash = p_key_hash and api_keys.revoked_at is null;
end;

comment on function api.identify_merchant(bytea) is
'The key with this SHA-256 and its merchant. No row: unknown or revoked.';

create or replace function api.audit_denial(p_key_hash bytea, p_request_id text, p_address text, p_route text, p_reason
text) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- Only keys that exist leave an entry: a caller without a key must not be able to fill the audit trail.
    select audit.write_entry(
        'denied', known.actor, 'denied', p_reason, p_merchant_id => known.merchant_id, p_address => p_address,
        p_request_id => p_request_id, p_snapshot => jsonb_build_object('route', p_route)
    )
    from (
        select 'key:' || api_keys.id as actor, api_keys.merchant_id
        from surety.api_keys
        where api_keys.hash = p_key_hash
        union all
        select 'operator:' || operator_keys.operator, null
        from surety.operator_keys
        where operator_keys.hash = p_key_hash
    ) as known;
end;

comment on function api.audit_denial(bytea, text, text, text, text) is
'Audits the denial of a request with an existing key, a merchant''s or an operator''s; other keys leave no entry.';
