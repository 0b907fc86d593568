-- Merchants: added, suspended and resumed by operators. Every change writes an audit entry.

create or replace function surety.audit_operator_action(
    p_actor text, p_merchant_id text, p_outcome text, p_snapshot jsonb
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select audit.write_entry(
        'operator', 'operator:' || p_actor, p_outcome, p_merchant_id => p_merchant_id, p_snapshot => p_snapshot
    );
end;

comment on function surety.audit_operator_action(text, text, text, jsonb) is
'Writes an operator''s action into the audit trail, in the transaction of that action.';

create or replace function surety.add_merchant(
    p_name text, p_provider_account text default '', p_actor text default session_user
) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with added as (
        insert into surety.merchants (id, name, provider_account, created_at, livemode)
        select
            surety.new_id('mer', surety.time_now()), p_name, surety.require_merchants_account(p_provider_account),
            surety.time_now(), environment.livemode
        from surety.environment
        returning merchants.id
    )

    select added.id
    from added, surety.audit_operator_action(
        p_actor, added.id, 'merchant added', jsonb_build_object('name', p_name, 'provider_account', p_provider_account)
    );
end;

comment on function surety.add_merchant(text, text, text) is
'Adds a merchant and returns its id. The provider account is empty for the platform''s own, whose id is refused
(merchant_has_no_account_of_the_platform).';

create or replace function surety.suspend_merchant(
    p_merchant_id text, p_is_suspended boolean, p_actor text default session_user
) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with changed as (
        update surety.merchants
        set suspended_at = case when p_is_suspended then surety.time_now() end
        where merchants.id = p_merchant_id and (merchants.suspended_at is not null) <> p_is_suspended
        returning merchants.id
    ),

    audited as (
        select changed.id
        from changed, surety.audit_operator_action(
            p_actor, changed.id, case when p_is_suspended then 'merchant suspended' else 'merchant resumed' end, '{}'
        )
    )

    select (select count(*) > 0 from audited)
    from surety.merchants cross join surety.await_standbys()
    where merchants.id = p_merchant_id;
end;

comment on function surety.suspend_merchant(text, boolean, text) is
'Suspends or resumes a merchant. False if nothing changed, null for an unknown merchant.';
