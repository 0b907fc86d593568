-- Monthly partitions by id. Rows of a payment lie in the month of the payment's id, all others in that of their own.

create or replace view surety.partitioned_tables as
select
    listed.parent::regclass as parent,
    listed.prefix
from (
    values
    ('surety.payments', 'pay'),
    ('surety.steps', 'pay'),
    ('surety.calls', 'pay'),
    ('surety.facts', 'pay'),
    ('surety.expectations', 'pay'),
    ('surety.provider_events', 'whk'),
    ('ledger.transfers', 'pst'),
    ('outbox.events', 'evt'),
    ('outbox.delivery_attempts', 'dat'),
    ('audit.entries', 'aud')
) as listed (parent, prefix);

comment on view surety.partitioned_tables is
'The tables in monthly partitions, and the prefix of the ids that decide the month.';

create or replace function surety.maintain_partitions(p_months_ahead integer default 3) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- One run at a time: the row of surety.environment is locked, because any login could hold an advisory lock for ever.
-- A partition is created as a table and then attached, because attaching hardly locks the parent. The first partition
-- of a table has no lower bound.
declare
    v_table record;
    v_month timestamp;
    v_this timestamp := date_trunc('month', surety.time_now() at time zone 'UTC');
    v_name text;
    v_from text;
    v_made integer := 0;
    v_key record;
    v_trigger record;
begin
    perform from surety.environment for no key update;
    for v_table in
        select parent, prefix, n.nspname, c.relname
        from surety.partitioned_tables
        join pg_class c on c.oid = parent join pg_namespace n on n.oid = c.relnamespace
    loop
        for v_month in select generate_series(v_this, v_this + make_interval(months => p_months_ahead), '1 month') loop
            v_name := v_table.relname || to_char(v_month, '_YYYYMM');
            continue when to_regclass(format('%I.%I', v_table.nspname, v_name)) is not null;
            -- The clock was set back over the end of a month: the first partition has room for the month before it.
            continue when exists (
                select from pg_inherits as i join pg_class as k on k.oid = i.inhrelid
                where i.inhparent = v_table.parent and k.relname > v_name
                    and pg_get_expr(k.relpartbound, k.oid) like 'FOR VALUES FROM (MINVALUE)%'
            );
            v_from := case
                when exists (select from pg_inherits where inhparent = v_table.parent)
                    then quote_literal(surety.id_at(v_table.prefix, v_month at time zone 'UTC'))
                else 'minvalue'
            end;
            execute format(
                'create table %1$I.%2$I (like %1$I.%3$I including defaults including generated including constraints)',
                v_table.nspname, v_name, v_table.relname);
            execute format(
                'alter table %1$I.%3$I attach partition %1$I.%2$I for values from (%4$s) to (%5$L)',
                v_table.nspname, v_name, v_table.relname, v_from,
                surety.id_at(v_table.prefix, (v_month + interval '1 month') at time zone 'UTC'));
            v_made := v_made + 1;
        end loop;
    end loop;
    for v_key in
        select
            k.name, k.columns, k.parent_columns, k.is_deferred, child.oid::regclass as child,
            parent.oid::regclass as parent
        from surety.sibling_keys as k
        join pg_inherits as i on i.inhparent = ('surety.' || k.child)::regclass
        join pg_class as child on child.oid = i.inhrelid
        join pg_class as parent on parent.relnamespace = 'surety'::regnamespace
            and parent.relname = k.parent || right(child.relname, 7)
        where not exists (select from pg_constraint as c where c.conrelid = child.oid and c.conname = k.name)
    loop
        execute format(
            'alter table %s add constraint %I foreign key (%s) references %s (%s) %s',
            v_key.child, v_key.name, v_key.columns, v_key.parent, v_key.parent_columns,
            case when v_key.is_deferred then 'deferrable initially deferred' end);
    end loop;
    for v_trigger in
        select t.tgname as name, i.inhrelid::regclass as partition
        from pg_trigger as t
        join pg_inherits as i on i.inhparent = t.tgrelid
        where t.tgfoid = to_regprocedure('audit.refuse_change()')
            -- A table that another role attached is left alone: an error here would stop all upkeep of partitions.
            and pg_has_role((select c.relowner from pg_class as c where c.oid = i.inhrelid), 'usage')
            and not exists (select from pg_trigger as own where own.tgrelid = i.inhrelid and own.tgfoid = t.tgfoid)
    loop
        execute format(
            'create trigger %I before update or delete or truncate on %s'
            ' for each statement execute function audit.refuse_change()',
            v_trigger.name, v_trigger.partition);
    end loop;
    return v_made;
end;
$$;

comment on function surety.maintain_partitions(integer) is
'Creates the partitions of this month and of p_months_ahead, the foreign keys between sibling partitions, and the
triggers of append-only tables on each partition, also on one that was attached by hand: a statement that names a
partition fires the partition''s triggers only. Returns how many partitions it created. It may be repeated and run
concurrently.';

select surety.maintain_partitions();

create or replace function surety.detachable_partitions(p_keep interval) returns table (partition text, detach text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_part record;
    v_is_held boolean;
begin
    for v_part in
        select
            t.parent, t.prefix, i.inhrelid::regclass as name,
            substring(pg_get_expr(c.relpartbound, c.oid) from $x$FROM \('([^']+)'\)$x$) as first_id,
            substring(pg_get_expr(c.relpartbound, c.oid) from $x$TO \('([^']+)'\)$x$) as end_id
        from surety.partitioned_tables as t
        join pg_inherits as i on i.inhparent = t.parent
        join pg_class as c on c.oid = i.inhrelid
        where t.prefix in ('evt', 'whk')
        -- By month: partitions that were created again have later object ids.
        order by right(c.relname, 6), t.prefix
    loop
        continue when v_part.end_id > surety.id_at(v_part.prefix, surety.time_now() - p_keep);
        if v_part.prefix = 'evt' then
            select exists (
                select from outbox.events as e
                join outbox.handler_events as t on t.event_type = e.type
                join outbox.handlers as h on h.handler = t.handler
                where e.id >= coalesce(v_part.first_id, '') and e.id < v_part.end_id
                    and e.generation = h.generation
                    and not pg_visible_in_snapshot(e.xid, h.seen)
            ) or exists (
                select from outbox.batches as b, unnest(b.event_ids) as held (id) where held.id < v_part.end_id
            ) or exists (
                select from outbox.retries as r where r.event_id < v_part.end_id
            ) or exists (
                select from outbox.dead_letters as d where d.event_id < v_part.end_id and d.closed_at is null
            ) or exists (
                select from outbox.webhook_endpoints as w
                join outbox.events as e on e.merchant_id = w.merchant_id
                where w.deleted_at is null and e.id >= coalesce(v_part.first_id, '') and e.id < v_part.end_id
                    and (e.generation > w.generation
                        or (e.generation = w.generation and not pg_visible_in_snapshot(e.xid, w.seen)))
            ) or exists (
                select from outbox.delivery_batches as b, unnest(b.event_ids) as held (id)
                where held.id < v_part.end_id
            ) or exists (
                select from outbox.delivery_retries as r where r.event_id < v_part.end_id and r.given_up_at is null
            ) into v_is_held;
            -- A partition in use keeps all younger partitions, those of webhooks too.
            exit when v_is_held;
        else
            select exists (
                select from outbox.events as e
                join outbox.handler_events as t on t.event_type = e.type
                join outbox.handlers as h on h.handler = t.handler
                where e.aggregate_type = 'webhook' and e.aggregate_id < v_part.end_id
                    and (
                        e.generation = h.generation and not pg_visible_in_snapshot(e.xid, h.seen)
                        or exists (select from outbox.retries as r where r.event_id = e.id)
                        or exists (select from outbox.batches as b where e.id = any(b.event_ids))
                        or exists (select from outbox.dead_letters as d where d.event_id = e.id and d.closed_at is null)
                    )
            ) into v_is_held;
            continue when v_is_held;
        end if;
        partition := v_part.name::text;
        detach := format('alter table %s detach partition %s concurrently', v_part.parent, v_part.name);
        return next;
    end loop;
end;
$$;

comment on function surety.detachable_partitions(interval) is
'Partitions of events and of stored webhooks that may be detached, oldest first, with the statement for each; it cannot
run inside a function. Such a partition is older than p_keep, all cursors of handlers and webhook endpoints are past it,
and none of its events is in a batch, waits for a retry or is an open dead letter. Payments, ledger and audit trail are
always kept.';

create or replace function outbox.drop_old_delivery_attempts(p_keep interval default '90 days') returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
declare
    v_name text;
    v_dropped integer := 0;
begin
    delete from outbox.delivery_hours as h where h.hour < surety.time_now() - interval '2 years';
    for v_name in
        select i.inhrelid::regclass::text
        from pg_inherits as i join pg_class as c on c.oid = i.inhrelid
        where i.inhparent = 'outbox.delivery_attempts'::regclass
            and substring(pg_get_expr(c.relpartbound, c.oid) from $x$TO \('([^']+)'\)$x$)
            <= surety.id_at('dat', surety.time_now() - p_keep)
    loop
        execute format('drop table %s', v_name);
        v_dropped := v_dropped + 1;
    end loop;
    return v_dropped;
exception
    -- The table is busy: the next run drops them.
    when lock_not_available then return 0;
end;
$$;

comment on function outbox.drop_old_delivery_attempts(interval) is
'Drops the partitions of the delivery log that are wholly older than p_keep, and hourly counts older than two years;
returns how many partitions. It waits at most a second for a lock.';
