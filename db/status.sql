-- What an operator should know, in one row: what waits, what was given up on, what holds things back.

create or replace function outbox.backlog(p_handler text, p_count_max integer)
returns table (backlog bigint, oldest_at timestamptz, retries_due bigint, suspects bigint, dead bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
-- What waits for a handler: events not taken (counted up to p_count_max) and events in batches, with the oldest one's
-- time.
declare
    v_now timestamptz := surety.time_now();
    v_handler outbox.handlers;
begin
    select h.* into v_handler from outbox.handlers as h where h.handler = p_handler;
    return query
    with waiting as (
        select s.id
        from outbox.scan(
            v_handler.epoch, v_handler.seen, pg_current_snapshot(), v_handler.at_xid, v_handler.at_id, p_count_max) as s
        where s.type = any(v_handler.event_types)
        union all
        select held.id
        from outbox.batches as b cross join unnest(b.event_ids) as held (id)
        where b.handler = p_handler
    )
    select
        (select count(*) from waiting),
        -- The time is in the id.
        (
            select to_timestamp(('x' || lpad(substr(min(w.id collate "C"), 5, 12), 16, '0'))::bit(64)::bigint / 1000.0)
            from waiting as w
        ),
        (select count(*) from outbox.retries as r where r.handler = p_handler and r.due_at <= v_now),
        (select count(*) from outbox.retries as r where r.handler = p_handler and r.kills > 0),
        (select count(*) from outbox.dead_letters as d where d.handler = p_handler and d.closed_at is null);
end;
$$;

create or replace function surety.read_status() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
-- Everything that `surety status` shows. Ages are seconds. transaction is the oldest of the whole cluster that holds
-- a snapshot or has written, whatever database it is in: it keeps rows from being vacuumed and seals from being made.
declare
    v_now timestamptz := surety.time_now();
begin
    return jsonb_build_object(
        'at', surety.iso(v_now),
        'is_restored_elsewhere', (
            select e.system_identifier <> outbox.system_identifier()
            from outbox.epochs as e order by e.epoch desc limit 1
        ),
        'handlers', (
            select jsonb_agg(jsonb_build_object(
                'handler', h.handler, 'backlog', b.backlog,
                'oldest_seconds', greatest(0, round(extract(epoch from v_now - b.oldest_at), 3)),
                'retries_due', b.retries_due, 'suspects', b.suspects, 'dead', b.dead,
                'is_paused', h.paused_at is not null
            ) order by h.handler)
            from outbox.handlers as h cross join lateral outbox.backlog(h.handler, 10000) as b
        ),
        'workers', (
            select jsonb_build_object(
                'alive', count(*) filter (where w.last_heartbeat > now() - interval '30 seconds'),
                'silent', count(*) filter (where w.last_heartbeat <= now() - interval '30 seconds'))
            from procrastinate.procrastinate_workers as w
        ),
        'dead_letters', (
            select jsonb_build_object(
                'open', count(*), 'first', (array_agg(d.id order by d.died_at))[1],
                'oldest_seconds', round(extract(epoch from v_now - min(d.died_at)), 3))
            from outbox.dead_letters as d where d.closed_at is null
        ),
        'discrepancies', (
            select jsonb_build_object(
                'open', count(*), 'critical', count(*) filter (where x.is_critical),
                'first', (array_agg(x.kind || ' ' || x.subject order by x.is_critical desc, x.opened_at))[1])
            from surety.discrepancies as x where x.closed_at is null
        ),
        'unfinished', (
            select jsonb_build_object(
                'id', p.id, 'state', p.state, 'seconds', round(extract(epoch from v_now - p.created_at), 3),
                'asked', p.asked)
            from surety.payments as p
            where p.ask_at is not null
            order by p.created_at
            limit 1
        ),
        'transaction', (
            select jsonb_build_object(
                'seconds', round(extract(epoch from clock_timestamp() - a.xact_start), 3), 'database', a.datname,
                'application', a.application_name, 'pid', a.pid, 'state', a.state)
            from pg_stat_activity as a
            where a.xact_start is not null and (a.backend_xid is not null or a.backend_xmin is not null)
                and a.pid <> pg_backend_pid()
            order by a.xact_start
            limit 1
        ),
        'partitions_until', (
            select min(ahead.until) from (
                select
                    max(substring(pg_get_expr(c.relpartbound, c.oid) from $x$TO \('\w+_([0-9a-f]{12})'\)$x$)) as until
                from surety.partitioned_tables as t
                join pg_inherits as i on i.inhparent = t.parent
                join pg_class as c on c.oid = i.inhrelid
                group by t.parent
            ) as ahead
        )
    );
end;
$$;
