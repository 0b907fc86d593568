-- Worker jobs: a job in Procrastinate's tables says that a handler has work, not which. Losing all jobs loses no event.

create or replace function outbox.has_work(p_handler text) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_behind_max constant integer := 100;
    v_now timestamptz := surety.time_now();
    v_handler outbox.handlers;
    v_event_types text[] := array(select t.event_type from outbox.handler_events as t where t.handler = p_handler);
begin
    select h.* into v_handler from outbox.handlers as h where h.handler = p_handler;
    return v_handler.paused_at is null and (
        v_handler.goal is not null
        or exists (select from outbox.retries as r where r.handler = p_handler and r.due_at <= v_now)
        or exists (select from outbox.batches as b where b.handler = p_handler and b.leased_until < v_now)
        or (
            select count(*) = v_behind_max or coalesce(bool_or(s.type = any(v_event_types)), false)
            from outbox.scan_events(
                v_handler.generation, v_handler.seen, pg_current_snapshot(), v_handler.at_xid, v_handler.at_id,
                v_behind_max) as s
        )
    );
end;
$$;

comment on function outbox.has_work(text) is
'Whether the handler has events to claim, or its cursor is a hundred events of other handlers behind.';

create or replace function outbox.schedule_handlers(p_handlers text[], p_is_urgent boolean default false)
returns integer
language plpgsql volatile security definer
-- Procrastinate's triggers name no schema.
set search_path = pg_catalog, procrastinate, pg_temp
as $$
declare
    -- A later claim was announced before the clock was set back.
    v_announced_max constant interval := '10 seconds';
    v_now timestamptz := surety.time_now();
    v_unknown text;
    v_scheduled integer;
begin
    select h.handler into v_unknown
    from unnest(p_handlers) as h (handler)
    where not exists (select from outbox.handlers as known where known.handler = h.handler);
    if found then
        raise exception 'no handler is named %', v_unknown using errcode = 'SU004';
    end if;
    insert into procrastinate.procrastinate_jobs (queue_name, task_name, queueing_lock, args)
    select 'outbox', 'drain', 'drain:' || h.handler, jsonb_build_object('handler', h.handler)
    from outbox.handlers as h
    where h.handler = any(p_handlers) and h.paused_at is null
        and (
            p_is_urgent or h.claims_again_at is null
            or h.claims_again_at not between v_now and v_now + v_announced_max
        )
        -- An insert beside a concurrent one would wait for its commit.
        and not exists (
            select from procrastinate.procrastinate_jobs as waiting
            where waiting.queueing_lock = 'drain:' || h.handler and waiting.status = 'todo'
        )
    order by h.handler
    on conflict (queueing_lock) where status = 'todo' do nothing;
    get diagnostics v_scheduled = row_count;
    return v_scheduled;
end;
$$;

comment on function outbox.schedule_handlers(text[], boolean) is
'Inserts a worker job for each handler that has none waiting and is not paused; returns how many. Call it after the
commit of the events. A handler whose worker has announced another claim (outbox.claim_batch) for the next ten seconds
needs none, unless p_is_urgent. Raises SU004 for an unknown handler.';

create or replace function outbox.delete_orphaned_jobs() returns integer
language sql volatile security definer
set search_path = pg_catalog, procrastinate, pg_temp
begin atomic
    with deleted as (
        delete from procrastinate.procrastinate_jobs
        where
            procrastinate_jobs.status = 'doing' and not exists (
                select from procrastinate.procrastinate_workers
                where
                    procrastinate_workers.id = procrastinate_jobs.worker_id
                    and procrastinate_workers.last_heartbeat > now() - interval '10 minutes'
            )
        returning procrastinate_jobs.id
    )

    select count(*)::integer from deleted;
end;

comment on function outbox.delete_orphaned_jobs() is
'Deletes jobs that run in workers without a heartbeat for ten minutes, and returns how many. Their work was scheduled
again by then.';

create or replace function outbox.schedule_due_handlers() returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- One scan for all handlers, from before the cursor that is furthest behind. If more events than a few wait, each
-- handler is asked.
declare
    v_scan_max constant integer := 200;
    v_behind_max constant integer := 100;
    v_now timestamptz := surety.time_now();
    v_generation integer;
    v_before pg_snapshot;
    v_due text[];
begin
    select max(h.generation), format('%1$s:%1$s:', min(pg_snapshot_xmin(h.seen)))::pg_snapshot
    into v_generation, v_before
    from outbox.handlers as h;
    with scanned as materialized (
        select s.xid, s.type
        from outbox.scan_events(v_generation, v_before, pg_current_snapshot(), '0', '', v_scan_max) as s
    ),
    typed as materialized (
        select
            h.handler, h.seen, h.goal, h.generation,
            array(select t.event_type from outbox.handler_events as t where t.handler = h.handler) as event_types
        from outbox.handlers as h
        where h.paused_at is null
    )
    select array_agg(h.handler order by h.handler) into v_due
    from typed as h
    where case
        when h.goal is not null
            or exists (select from outbox.retries as r where r.handler = h.handler and r.due_at <= v_now)
            or exists (select from outbox.batches as b where b.handler = h.handler and b.leased_until < v_now)
            then true
        when h.generation <> v_generation or (select count(*) from scanned) = v_scan_max
            then outbox.has_work(h.handler)
        else (
            select count(*) >= v_behind_max or coalesce(bool_or(s.type = any(h.event_types)), false)
            from scanned as s
            where not pg_visible_in_snapshot(s.xid, h.seen)
        )
    end;
    if v_due is not null then
        perform outbox.schedule_handlers(v_due);
    end if;
    return v_due;
end;
$$;

comment on function outbox.schedule_due_handlers() is
'Schedules the handlers that have work, and returns their names; null if there are none.';

create or replace function outbox.schedule_work_since(p_idle_mark text) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_seen pg_snapshot := split_part(p_idle_mark, ' ', 1)::pg_snapshot;
    v_mark_hash bigint := split_part(p_idle_mark, ' ', 2)::bigint;
    v_goal pg_snapshot := pg_current_snapshot();
    v_hash bigint := (
        select hashtextextended(string_agg(h::text, '' order by h.handler), 0) from outbox.handlers as h);
begin
    -- The mark is taken before the handlers are asked, so a change beside this call is seen by the next one.
    if v_hash is distinct from v_mark_hash
        or exists (
            select from outbox.handlers as h
            where h.paused_at is null and (
                exists (select from outbox.retries as r where r.handler = h.handler and r.due_at <= v_now)
                or exists (select from outbox.batches as b where b.handler = h.handler and b.leased_until < v_now)
            )
        )
        or exists (
            select from outbox.scan_events(
                (select max(h.generation) from outbox.handlers as h), v_seen, v_goal, '0', '', 1)
        )
    then
        if outbox.schedule_due_handlers() is not null then
            return null;
        end if;
    end if;
    return v_goal || ' ' || v_hash;
end;
$$;

comment on function outbox.schedule_work_since(text) is
'Schedules the handlers that have work. Returns a mark if none has, else null. Given the mark of the last call, it asks
handler by handler only if something has changed since: an event, a due retry, an expired lease, a handler. A worker
calls it every second.';
