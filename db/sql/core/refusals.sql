-- Refusals of API keys and webhooks: all are counted by hour, the first of each hour are audited.

create or replace function audit.count_refusal(p_kind text, p_reason text, p_actor text, p_count bigint default 1)
returns boolean
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    insert into audit.refusals as known (hour, kind, reason, actor, count)
    values (date_trunc('hour', surety.time_now(), 'UTC'), p_kind, p_reason, p_actor, p_count)
    on conflict (hour, kind, reason, actor) do update set count = known.count + excluded.count
    returning known.count <= 100;
end;

comment on function audit.count_refusal(text, text, text, bigint) is
'Counts refusals; true for the first hundred of an hour, reason and actor, which are audited one by one.';

create or replace function surety.count_refusals(p_kind text, p_counts jsonb) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        audit.count_refusal(
            p_kind, split_part(counts.reason, ' ', 1), split_part(counts.reason, ' ', 2), counts.count::bigint
        )
    from jsonb_each_text(p_counts) as counts (reason, count)
    order by counts.reason;
end;

comment on function surety.count_refusals(text, jsonb) is
'Counts refusals that are not audited one by one: {reason: count}. An actor may follow the reason after a space.';

create or replace function surety.list_refusals()
returns table (kind text, reason text, is_known_key boolean, hour_count bigint, day_count bigint)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        refusals.kind,
        refusals.reason,
        refusals.actor <> '',
        coalesce(sum(refusals.count) filter (
            where refusals.hour = date_trunc('hour', surety.time_now(), 'UTC')
        ), 0)::bigint,
        sum(refusals.count)::bigint
    from audit.refusals
    where refusals.hour > surety.time_now() - interval '24 hours'
    group by 1, 2, 3
    order by 1, 2, 3;
end;

comment on function surety.list_refusals() is
'Refusals of this hour and of the last 24 hours, by kind, reason, and whether the key is or was one of ours.';

create or replace function surety.delete_old_refusals() returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with deleted as (
        delete from audit.refusals
        where refusals.hour < surety.time_now() - interval '30 days'
        returning refusals.hour
    )

    select count(*)::integer from deleted;
end;

comment on function surety.delete_old_refusals() is
'Deletes counts of refusals that are older than 30 days; returns how many. An hour has one for each reason and key.';
