-- Velocity rules: added, listed and removed by operators. A rule never changes, so that a hold names what it followed.

create or replace function surety.add_velocity_rule(
    p_merchant_id text, p_subject text, p_period interval, p_count_max bigint, p_amount_max_minor bigint,
    p_currency text, p_action text, p_actor text default session_user
) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with added as (
        insert into surety.velocity_rules (
            id, merchant_id, subject, period, count_max, amount_max_minor, currency, action, created_by, created_at
        )
        values (
            surety.new_id('vel', surety.time_now()), p_merchant_id, p_subject, p_period, p_count_max,
            p_amount_max_minor, p_currency, p_action, p_actor, surety.time_now()
        )
        returning velocity_rules.id
    )

    select added.id
    from added, surety.audit_operator_action(
        p_actor, p_merchant_id, 'velocity rule added',
        jsonb_build_object(
            'rule', added.id, 'subject', p_subject, 'seconds', extract(epoch from p_period), 'count', p_count_max,
            'amount', p_amount_max_minor, 'currency', p_currency, 'action', p_action
        )
    );
end;

comment on function surety.add_velocity_rule(text, text, interval, bigint, bigint, text, text, text) is
'Adds a velocity rule and returns its id. Payments that were accepted within its period count at once. p_merchant_id
null: for each merchant.';

create or replace function surety.remove_velocity_rule(p_id text, p_actor text default session_user) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with removed as (
        update surety.velocity_rules set removed_at = surety.time_now()
        where velocity_rules.id = p_id and velocity_rules.removed_at is null
        returning velocity_rules.id, velocity_rules.merchant_id
    ),

    audited as (
        select removed.id
        from removed, surety.audit_operator_action(
            p_actor, removed.merchant_id, 'velocity rule removed', jsonb_build_object('rule', removed.id)
        )
    )

    select (select count(*) > 0 from audited)
    from surety.velocity_rules cross join surety.await_standbys()
    where velocity_rules.id = p_id;
end;

comment on function surety.remove_velocity_rule(text, text) is
'Removes a velocity rule. Payments that it holds stay on hold. False if it was removed already, null for an unknown
id.';
