-- Status: the figures that operators need, as one document.

create or replace function outbox.handler_backlog(p_handler text, p_count_max integer)
returns table (backlog bigint, oldest_at timestamptz, retries_due bigint, suspects bigint, dead bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_handler outbox.handlers;
    v_event_types text[] := array(select t.event_type from outbox.handler_events as t where t.handler = p_handler);
begin
    select h.* into v_handler from outbox.handlers as h where h.handler = p_handler;
    return query
    with waiting as (
        select s.id
        from outbox.scan_events(
            v_handler.generation, v_handler.seen, pg_current_snapshot(), v_handler.at_xid, v_handler.at_id,
                p_count_max) as s
        where s.type = any(v_event_types)
        union all
        select held.id
        from outbox.batches as b cross join unnest(b.event_ids) as held (id)
        where b.handler = p_handler
    )
    select
        (select count(*) from waiting),
        -- An id begins with its time.
        (
            select to_timestamp(('x' || lpad(substr(min(w.id collate "C"), 5, 11), 16, '0'))::bit(64)::bigint / 1000.0)
            from waiting as w
        ),
        (select count(*) from outbox.retries as r where r.handler = p_handler and r.due_at <= v_now),
        (select count(*) from outbox.retries as r where r.handler = p_handler and r.worker_deaths > 0),
        (select count(*) from outbox.dead_letters as d where d.handler = p_handler and d.closed_at is null);
end;
$$;

comment on function outbox.handler_backlog(text, integer) is
'The events that wait for a handler: those not taken (counted up to p_count_max) and those in batches, the time of the
oldest, retries that are due, poison-message candidates (suspects) and open dead letters.';

create or replace function surety.vacuum_blockers()
returns table (
    kind text, name text, database text, seconds double precision, xids integer, pid integer, is_active boolean,
    wal_bytes bigint
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        held.kind,
        held.name,
        held.database,
        held.seconds,
        held.xids,
        held.pid,
        held.is_active,
        held.wal_bytes
    from (
        select
            case when a.wait_event = 'SyncRep' then 'commit' else 'transaction' end as kind,
            coalesce(nullif(a.application_name, ''), a.usename::text, a.backend_type) as name,
            a.datname::text as database,
            extract(epoch from clock_timestamp() - a.xact_start)::double precision as seconds,
            greatest(age(a.backend_xid), age(a.backend_xmin)) as xids,
            a.pid,
            a.state = 'active' as is_active,
            null::bigint as wal_bytes
        from pg_stat_activity as a
        where
            a.xact_start is not null and (a.backend_xid is not null or a.backend_xmin is not null)
            and a.pid <> pg_backend_pid() and a.backend_type not in ('autovacuum worker', 'walsender')
        union all
        select
            'prepared transaction',
            p.gid,
            p.database::text,
            extract(epoch from clock_timestamp() - p.prepared)::double precision,
            age(p.transaction),
            null,
            false,
            null
        from pg_prepared_xacts as p
        union all
        select
            'replication slot',
            s.slot_name::text,
            s.database::text,
            null,
            greatest(age(s.xmin), age(s.catalog_xmin)),
            s.active_pid,
            s.active,
            case
                when not pg_is_in_recovery() then pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::bigint
            end
        from pg_replication_slots as s
        union all
        select
            'standby',
            r.application_name,
            null,
            null,
            age(r.backend_xmin),
            r.pid,
            true,
            null
        from pg_stat_replication as r
        where r.backend_xmin is not null
    ) as held
    order by held.xids desc nulls last, held.seconds desc nulls last
    limit 20;
end;

comment on function surety.vacuum_blockers() is
'The transactions with a snapshot or an id, commits that wait for a standby, prepared transactions, replication slots
and standbys that prevent vacuuming in any database of the cluster, those that hold back most transactions first.';

create or replace function surety.publication_status() returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        jsonb_build_object(
            'exists', count(p.oid) > 0,
            'is_whole', coalesce(bool_and(
                p.pubviaroot and p.pubinsert and (
                    p.puballtables or exists (
                        select from pg_publication_rel as r
                        where r.prpubid = p.oid and r.prrelid = 'outbox.events'::regclass and r.prqual is null
                            and r.prattrs is null
                    )
                )
            ), false),
            'lost_slots', array(
                select s.slot_name::text from pg_replication_slots as s
                where s.slot_type = 'logical' and s.database = current_database() and s.wal_status = 'lost'
                order by s.slot_name
            ),
            'lost_standby_slots', array(
                select s.slot_name::text from pg_replication_slots as s
                where s.slot_type = 'physical' and s.wal_status = 'lost'
                order by s.slot_name
            )
        )
    from pg_publication as p
    where p.pubname = 'surety_events';
end;

comment on function surety.publication_status() is
'The publication surety_events. is_whole: each event is published, by the name outbox.events. lost_slots: logical slots
of this database whose log is gone, so that their readers miss events. lost_standby_slots: those of standbys, which
can''t catch up.';

create or replace function surety.replication_status() returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        jsonb_build_object(
            'names', given.names,
            -- A standby's own figure: how old its last replayed commit is.
            'replayed_seconds',
            case when pg_is_in_recovery() then coalesce(
                round(extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp()), 3), 0
            ) end,
            'needed',
            case
                when given.names = '' or pg_is_in_recovery() then 0
                else coalesce((regexp_match(given.names, '^\s*(?:first|any)?\s*(\d+)\s*\(', 'i'))[1]::integer, 1)
            end,
            'present', (
                select count(*) from pg_stat_replication
                where pg_stat_replication.sync_state in ('sync', 'quorum') and pg_stat_replication.state = 'streaming'
            ),
            -- In live mode a standby that takes over does business at once only if servers are listed.
            'unlisted_standbys', (
                select count(*) from pg_stat_replication as r
                where
                    r.state in ('streaming', 'catchup') and r.application_name <> 'pg_receivewal'
                    and surety.read_livemode() and not exists (select from outbox.business_servers)
                    and not exists (
                        select from pg_replication_slots as s
                        where r.pid = s.active_pid and s.slot_type = 'logical'
                    )
            ),
            'waiting', count(*) filter (where sessions.wait_event = 'SyncRep'),
            'waiting_seconds', round(extract(epoch from clock_timestamp() - min(sessions.query_start) filter (
                where sessions.wait_event = 'SyncRep'
            )), 3),
            -- A server in recovery has no WAL writer: it starts with the server, or when a standby is promoted.
            'primary_seconds', round(extract(epoch from clock_timestamp() - min(sessions.backend_start) filter (
                where sessions.backend_type = 'walwriter'
            )), 3)
        )
    from (select btrim(current_setting('synchronous_standby_names')) as names) as given
    left join pg_stat_activity as sessions on true
    group by given.names;
end;

comment on function surety.replication_status() is
'Replication. On a standby, the age of the last replayed commit (replayed_seconds, else null). On a primary,
synchronous_standby_names (empty: none), how many standbys a commit needs and how many are present, the standbys that
`surety servers` does not list in live mode because it lists none, the commits that wait and for how long, and since
when this server is the primary. Without the rights of pg_read_all_stats
everything but the names is unknown and looks like zero or null.';

create or replace function surety.unfinished_payments_in_retry(p_limit integer)
returns table (payment_id text, is_unknown boolean, sent_at timestamptz)
language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
begin atomic
    with waiting as (
        (
            select events.aggregate_id as payment_id
            from outbox.retries
            inner join outbox.events on retries.event_id = events.id
            where events.aggregate_type = 'payment'
            order by retries.event_id
            limit p_limit
        )
        union
        (
            select dead_letters.payment_id
            from outbox.dead_letters
            where dead_letters.closed_at is null and dead_letters.payment_id is not null
            order by dead_letters.id
            limit p_limit
        )
    )

    select
        payments.id,
        count(calls.payment_id) > 0,
        min(calls.first_sent_at)
    from waiting
    inner join surety.payments on waiting.payment_id = payments.id
    inner join surety.states on payments.state = states.state
    left join surety.calls
        on
            payments.id = calls.payment_id and (calls.answered_at is null or calls.status >= 500)
            and calls.refused_through < calls.sends
    where not states.is_final
    group by payments.id;
end;

comment on function surety.unfinished_payments_in_retry(integer) is
'Unfinished payments with an event in retry or a dead letter, at most p_limit of each. is_unknown: a call was sent at
sent_at and has no answer, or one of status 500 and above.';

create or replace function surety.read_status() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_count_max constant integer := 2000;
begin
    return jsonb_build_object(
        'at', surety.format_time(v_now),
        'livemode', surety.read_livemode(),
        'is_drill', (outbox.restore_generation()).is_drill,
        'closed_because', outbox.closed_because(outbox.restore_generation()),
        'is_restored', (
            select
                outbox.closed_because(e) is not null
                or outbox.has_future_transactions(e.generation) is true
            from outbox.restore_generations as e order by e.generation desc limit 1
        ),
        'handlers', (
            select jsonb_agg(jsonb_build_object(
                'handler', h.handler, 'backlog', b.backlog,
                'oldest_seconds', greatest(0, round(extract(epoch from v_now - b.oldest_at), 3)),
                'retries_due', b.retries_due, 'suspects', b.suspects, 'dead', b.dead,
                'is_paused', h.paused_at is not null
            ) order by h.handler)
            from outbox.handlers as h cross join lateral outbox.handler_backlog(h.handler, 10000) as b
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
                'open', count(*), 'critical', count(*) filter (where x.severity = 'critical'),
                'first', (array_agg(x.kind || ' ' || x.subject order by x.severity, x.opened_at))[1],
                'first_id', (array_agg(x.id order by x.severity, x.opened_at))[1])
            from surety.discrepancies as x
            where x.closed_at is null and x.severity in ('critical', 'warning')
                and coalesce(x.snoozed_until, '-infinity') <= v_now
        ),
        'holds', surety.summarize_open_holds(),
        'unfinished', (
            select jsonb_build_object(
                'id', p.id, 'state', p.state, 'seconds', round(extract(epoch from v_now - p.created_at), 3),
                'asked', p.poll_count)
            from surety.payments as p
            where p.id = least(
                -- By time, not by id: the index of polled payments is small, that of ids is not.
                (select a.id from surety.payments as a where a.poll_at is not null order by a.created_at limit 1),
                (select min(e.payment_id) from surety.unfinished_payments_in_retry(v_count_max) as e)
            )
        ),
        'unknown', (
            select jsonb_build_object(
                'count', count(*), 'first', min(e.payment_id),
                'oldest_seconds', round(extract(epoch from v_now - min(e.sent_at)), 3))
            from surety.unfinished_payments_in_retry(v_count_max) as e where e.is_unknown
        ),
        'providers', (
            select coalesce(jsonb_agg(to_jsonb(circuits) order by circuits.provider), '[]')
            from (
                select
                    b.provider, count(*) as accounts, count(*) filter (where b.state = 'unreachable') as open,
                    count(*) filter (where b.state = 'refused') as refused, sum(b.held) as held,
                    round(max(b.error_share)::numeric, 4) as error_share,
                    round(extract(epoch from v_now - min(b.opened_at) filter (where b.state = 'unreachable')), 3)
                        as open_seconds,
                    round(extract(epoch from v_now - min(b.opened_at) filter (where b.state = 'refused')), 3)
                        as refused_seconds,
                    (array_agg(b.account order by b.opened_at) filter (where b.state = 'unreachable'))[1] as first,
                    (array_agg(b.reason order by b.opened_at) filter (where b.state = 'unreachable'))[1] as reason,
                    round(extract(epoch from min(b.next_probe_at) - v_now), 3) as probe_seconds
                from surety.circuit_status() as b
                group by b.provider
            ) as circuits
        ),
        'refused_accounts', (
            select coalesce(jsonb_agg(to_jsonb(a)), '[]') from surety.list_refused_accounts() as a
        ),
        'silent_webhooks', surety.find_silent_webhooks(),
        'waiting_events', (
            select coalesce(jsonb_agg(to_jsonb(w)), '[]') from surety.list_waiting_events() as w
        ),
        'overdue_jobs', (
            select coalesce(jsonb_agg(to_jsonb(j)), '[]') from surety.list_overdue_jobs() as j
        ),
        'unreadable_lists', (
            select coalesce(jsonb_agg(to_jsonb(l)), '[]') from surety.list_unreadable_lists() as l
        ),
        'keys', (
            select coalesce(jsonb_agg(to_jsonb(k)), '[]') from surety.list_provider_keys() as k
        ),
        'expiring_keys', (
            select coalesce(jsonb_agg(to_jsonb(k)), '[]') from surety.list_expiring_keys(interval '14 days') as k
        ),
        'refusals', (
            select coalesce(jsonb_agg(to_jsonb(r)), '[]') from surety.list_refusals() as r
        ),
        'limited_merchants', (
            select coalesce(jsonb_agg(to_jsonb(m)), '[]') from surety.list_limited_merchants() as m
        ),
        'refused_payments', (
            select coalesce(jsonb_agg(to_jsonb(p)), '[]') from surety.list_refused_payments() as p
        ),
        'overdue_objects', (
            select coalesce(jsonb_agg(to_jsonb(o)), '[]') from surety.list_overdue_objects() as o
        ),
        'holders', (
            select coalesce(jsonb_agg(to_jsonb(h) order by h.xids desc nulls last, h.seconds desc nulls last), '[]')
            from surety.vacuum_blockers() as h
        ),
        'replication', surety.replication_status(),
        'publication', surety.publication_status(),
        'sees_all', pg_has_role('surety_owner', 'pg_read_all_stats', 'usage'),
        'partitions_until', (
            select
                surety.format_time(to_timestamp(
                    (('x' || lpad(min(ahead.until), 16, '0'))::bit(64)::bigint / 1000.0)::double precision
                ))
            from (
                select
                    max(substring(pg_get_expr(c.relpartbound, c.oid) from $x$TO \('\w+_([0-9a-f]{11})'\)$x$)) as until
                from surety.partitioned_tables as t
                join pg_inherits as i on i.inhparent = t.parent
                join pg_class as c on c.oid = i.inhrelid
                group by t.parent
            ) as ahead
        )
    );
end;
$$;

comment on function surety.read_status() is
'Everything that `surety status` shows, as one document. Ages are seconds. sees_all: transactions of other logins are
seen as well.';
