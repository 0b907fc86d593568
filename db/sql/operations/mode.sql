-- The mode of the database: live (real money moves) or test. It is decided before the first merchant. Constraints keep
-- it from changing later: merchants refer to it, and payments to their merchant's. Facts without a payment refer to it
-- too, because the provider's money moves in the ledger before there is a merchant.

create or replace function surety.read_livemode() returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select environment.livemode from surety.environment;
end;

comment on function surety.read_livemode() is
'Whether this database is in live mode, so that real money moves.';

create or replace function surety.set_livemode(p_livemode boolean, p_actor text default session_user) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with changed as (
        update surety.environment set livemode = p_livemode
        where environment.livemode <> p_livemode
        returning environment.livemode
    ),

    audited as (
        select changed.livemode
        from changed, surety.audit_operator_action(
            p_actor, null, case when changed.livemode then 'live mode set' else 'test mode set' end, '{}'
        )
    )

    select (select count(*) > 0 from audited) from surety.await_standbys();
end;

comment on function surety.set_livemode(boolean, text) is
'Sets the mode of this database; false if it was set already. Violates merchant_has_the_mode_of_its_database once there
is a merchant, unmatched_fact_has_the_mode_of_its_database once workers have stored money of the provider''s, and
test_environment_moves_no_real_money in a database whose clock can be moved.';
