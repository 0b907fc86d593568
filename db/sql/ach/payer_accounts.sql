-- Bank accounts: added, validated, changed, revoked, removed; their numbers come encrypted and leave encrypted.
--
-- The life of an account:
--
--   add_payer_account         with a mandate; not validated
--   record_validation        pending, validated or failed, by a method; it holds for the account's version
--   change_payer_account      another routing or account number: a new version, which is not validated
--   revoke_mandate           no entry may name the account any more
--   remove_payer_account      the account is gone; its mandate is kept
--
-- payer_account_obstacle says why an entry may not name the account.

create or replace function surety.check_payer_account_change() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
    -- A rotation of keys changes fingerprint and key at once.
    if new.version = old.version and (
        (new.routing_number, new.account_type, new.last4) is distinct from
        (old.routing_number, old.account_type, old.last4)
        or (new.fingerprint is distinct from old.fingerprint and new.fingerprint is not null
            and new.key_id is not distinct from old.key_id)
    ) then
        raise exception 'a change of bank account % raises its version', old.id
        using errcode = 'check_violation', constraint = 'validation_is_of_the_accounts_version';
    end if;
    return new;
end;
$$;

comment on function surety.check_payer_account_change() is
'Refuses a change of an account''s routing number, type or number that keeps its version, and so its validation.';

create or replace trigger payer_account_change_raises_its_version before update on surety.payer_accounts
for each row execute function surety.check_payer_account_change();

create or replace function surety.audit_payer_account(
    p_account surety.payer_accounts, p_actor text, p_outcome text, p_more jsonb default '{}'
) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    select surety.audit_operator_action(
        p_actor, p_account.merchant_id, p_outcome,
        jsonb_build_object(
            'payer_account', p_account.id, 'customer', p_account.customer_id, 'last4', p_account.last4,
            'version', p_account.version
        ) || p_more
    );
end;

comment on function surety.audit_payer_account(surety.payer_accounts, text, text, jsonb) is
'Audits what was done to a bank account. The entry has its last four characters, never its number.';

create or replace function surety.add_payer_account(
    p_id text, p_merchant_id text, p_customer_id text, p_routing_number text, p_account_type text,
    p_holder_type text, p_holder_name text, p_last4 text, p_sealed_number bytea, p_key_id text,
    p_fingerprints bytea[], p_mandate jsonb, p_actor text default session_user
) returns table (id text, is_new boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_account surety.payer_accounts;
begin
    perform from surety.customers as c
    where c.merchant_id = p_merchant_id and c.id = p_customer_id and c.erased_at is null
    for update;
    if not found then
        return;
    end if;
    -- By the hash of every key: a rotation may not have reached the row.
    select * into v_account from surety.payer_accounts as b
    where b.customer_id = p_customer_id and b.fingerprint = any(p_fingerprints) and b.removed_at is null;
    if found then
        return query select v_account.id, false;
        return;
    end if;
    insert into surety.payer_accounts (
        id, merchant_id, customer_id, routing_number, account_type, holder_type, holder_name, last4, sealed_number,
        key_id, fingerprint, mandate, validation_changed_at, created_at
    )
    values (
        p_id, p_merchant_id, p_customer_id, p_routing_number, p_account_type, p_holder_type, p_holder_name, p_last4,
        p_sealed_number, p_key_id, p_fingerprints[1], p_mandate, surety.time_now(), surety.time_now()
    )
    returning * into v_account;
    perform surety.audit_payer_account(v_account, p_actor, 'bank account added');
    return query select v_account.id, true;
end;
$$;

comment on function surety.add_payer_account(
    text, text, text, text, text, text, text, text, bytea, text, bytea[], jsonb, text
) is
'Stores a customer''s bank account and returns its id; that of the account if the customer has it already (is_new
false). p_id is a new id, for which the number was encrypted. p_fingerprints: its hash by each key, the encrypting one
first. No row for an unknown or erased customer.';

create or replace function surety.record_validation(
    p_id text, p_validation text, p_method text, p_version integer, p_reason text, p_actor text default session_user
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_account surety.payer_accounts;
begin
    update surety.payer_accounts as b
    set validation = p_validation, validation_method = p_method, validation_changed_at = surety.time_now(),
        validated_version = case when p_validation = 'validated' then b.version end
    where b.id = p_id and b.version = p_version and b.removed_at is null
    returning * into v_account;
    if not found then
        return false;
    end if;
    perform surety.audit_payer_account(
        v_account, p_actor, 'bank account validation: ' || p_validation,
        jsonb_build_object('method', p_method, 'reason', p_reason));
    return true;
end;
$$;

comment on function surety.record_validation(text, text, text, integer, text, text) is
'Records pending, validated or failed for a version of an account. False if the account is unknown, removed, or has
another version by now: the stored account is another one.';

create or replace function surety.change_payer_account(
    p_id text, p_version integer, p_routing_number text, p_account_type text, p_last4 text, p_sealed_number bytea,
    p_key_id text, p_fingerprint bytea, p_reason text, p_actor text default session_user
) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_account surety.payer_accounts;
begin
    update surety.payer_accounts as b
    set routing_number = p_routing_number, account_type = p_account_type, last4 = p_last4,
        sealed_number = p_sealed_number, key_id = p_key_id, fingerprint = p_fingerprint, version = b.version + 1,
        validation = 'unvalidated', validation_method = null, validated_version = null,
        validation_changed_at = surety.time_now()
    where b.id = p_id and b.version = p_version and b.removed_at is null
    returning * into v_account;
    if not found then
        return null;
    end if;
    perform surety.audit_payer_account(
        v_account, p_actor, 'bank account changed', jsonb_build_object('reason', p_reason));
    return v_account.version;
end;
$$;

comment on function surety.change_payer_account(text, integer, text, text, text, bytea, text, bytea, text, text) is
'Gives an account another routing number, type or number, as a notification of change says, and returns its new version,
which is not validated. Null if the account is unknown, removed, or has another version than p_version.';

create or replace function surety.revoke_mandate(p_id text, p_reason text, p_actor text default session_user)
returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_account surety.payer_accounts;
begin
    update surety.payer_accounts as b set mandate_revoked_at = surety.time_now()
    where b.id = p_id and b.mandate_revoked_at is null
    returning * into v_account;
    if not found then
        return exists (select from surety.payer_accounts as b where b.id = p_id) and null;
    end if;
    perform surety.audit_payer_account(v_account, p_actor, 'mandate revoked', jsonb_build_object('reason', p_reason));
    return true;
end;
$$;

comment on function surety.revoke_mandate(text, text, text) is
'Revokes the mandate of an account: no entry may name it any more. Null if it was revoked before, false for an unknown
account.';

create or replace function surety.remove_payer_account(p_id text, p_reason text, p_actor text default session_user)
returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_account surety.payer_accounts;
begin
    update surety.payer_accounts as b
    set removed_at = surety.time_now(), mandate_revoked_at = coalesce(b.mandate_revoked_at, surety.time_now())
    where b.id = p_id and b.removed_at is null
    returning * into v_account;
    if not found then
        return exists (select from surety.payer_accounts as b where b.id = p_id) and null;
    end if;
    perform surety.audit_payer_account(
        v_account, p_actor, 'bank account removed', jsonb_build_object('reason', p_reason));
    return true;
end;
$$;

comment on function surety.remove_payer_account(text, text, text) is
'Removes an account and revokes its mandate. The encrypted number stays for returns and for the proof of entries, until
an erasure. Null if it was removed before, false for an unknown account.';

create or replace function surety.payer_account_obstacle(p_account surety.payer_accounts, p_entry_class text)
returns text
language sql immutable parallel safe
return case
    when p_account.removed_at is not null then 'removed'
    when p_account.mandate_revoked_at is not null then 'mandate_revoked'
    when p_account.validation = 'failed' then 'validation_failed'
    when p_entry_class = 'WEB' and p_account.validation <> 'validated' then 'not_validated'
    when p_entry_class in ('WEB', 'PPD') and p_account.holder_type <> 'individual' then 'of_a_company'
    when p_entry_class = 'CCD' and p_account.holder_type <> 'company' then 'of_an_individual'
end;

comment on function surety.payer_account_obstacle(surety.payer_accounts, text) is
'Why no debit of an entry class may name the account; null if one may. A WEB debit needs a validated account, and the
first one after each change again.';

create or replace function surety.reseal_payer_account(
    p_id text, p_old_sealed bytea, p_sealed_number bytea, p_key_id text, p_fingerprint bytea
) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with resealed as (
        update surety.payer_accounts
        set sealed_number = p_sealed_number, key_id = p_key_id, fingerprint = p_fingerprint
        where payer_accounts.id = p_id and payer_accounts.sealed_number = p_old_sealed
        returning payer_accounts.id
    )

    select count(*) > 0 from resealed;
end;

comment on function surety.reseal_payer_account(text, bytea, bytea, text, bytea) is
'Stores the number of an account as another key encrypts it. False if it was changed meanwhile: repeat it.';
