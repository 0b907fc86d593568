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
text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_actor text;
    v_merchant_id text;
begin
    select known.actor, known.merchant_id into v_actor, v_merchant_id
    from (
        select 'key:' || k.id as actor, k.merchant_id from surety.api_keys as k where k.hash = p_key_hash
        union all
        select 'operator:' || o.operator, null from surety.operator_keys as o where o.hash = p_key_hash
    ) as known
    limit 1;
    -- Unknown keys cause no write here: the API counts them in memory and writes sums.
    if v_actor is null then
        return false;
    end if;
    if audit.count_refusal('denied', p_reason, v_actor) then
        perform audit.write_entry(
            'denied', v_actor, 'denied', p_reason, p_merchant_id => v_merchant_id, p_address => p_address,
            p_request_id => p_request_id, p_snapshot => jsonb_build_object('route', p_route)
        );
    end if;
    return true;
end;
$$;

comment on function api.audit_denial(bytea, text, text, text, text) is
'Counts the denial of a request with an existing key, a merchant''s or an operator''s, and audits the first hundred of
an hour. False, and nothing is counted, for any other key.';
