-- Requests that wait for an event: one call finds which of all waiting requests of a process have what they wait for.

create or replace function api.find_ended_waits(
    p_payments text[], p_cancellations text[], p_refunds text[], p_readers text[], p_generations integer[],
    p_snapshots text[], p_secret_requests text[]
) returns table (
    payments text[], cancellations text[], refunds text[], readers bigint[], secret_requests text[]
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
declare
    v_now_seen constant pg_snapshot := pg_current_snapshot();
    v_generation constant integer := outbox.current_restore_generation();
    v_undecided constant text [] := array(select s.state from surety.states as s where s.status = 'pending');
    v_cancelable constant text [] := v_undecided || array(
        select s.state from surety.states as s where s.status in ('requires_action', 'requires_capture')
    );
begin
    return query select
        array(
            select p.id
            from unnest(p_payments) as w (id) join surety.payments as p on p.id = w.id
            where p.state <> all(v_undecided)
        ),
        array(
            select p.id
            from unnest(p_cancellations) as w (id) join surety.payments as p on p.id = w.id
            where p.state <> all(v_cancelable)
        ),
        array(
            select r.id
            from unnest(p_refunds) as w (id) join surety.refunds as r on r.id = w.id
            where r.state <> 'pending'
        ),
        -- A transaction that was open in the reader's snapshot may have committed since, so each is looked up.
        array(
            select w.n
            from unnest(p_readers, p_generations, p_snapshots) with ordinality as w (merchant_id, generation, seen, n)
            where
                w.generation < v_generation
                or exists (
                    select from outbox.walk_events(
                        false, w.merchant_id, w.generation, w.seen::pg_snapshot, v_now_seen, '0', '', 1)
                )
        ),
        array(
            select w.id
            from unnest(p_secret_requests) as w (id)
            where not exists (
                select from surety.client_secret_requests as s
                where s.id = w.id and s.sealed is null and s.failure is null
            )
        );
end;
$$;

comment on function api.find_ended_waits(text[], text[], text[], text[], integer[], text[], text[]) is
'Of the ids given: payments that are not pending, payments whose cancellation is decided, refunds that are not pending,
requests for client secrets that are answered or gone.
Of the readers of events (merchant, restore generation, snapshot, as api.read_position has them), the places, from 1, of
those with an event that their snapshot does not include.';

create or replace function api.read_position(p_key_hash bytea, p_next text, p_address text default '')
returns table (merchant_id text, generation integer, seen text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_parts text [] := string_to_array(
        convert_from(decode(translate(p_next, '-_', '+/'), 'base64'), 'UTF8'), ' ');
begin
    return query
    select who.merchant_id, v_parts[1]::integer, api.decode_snapshot(v_parts[2])::text
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;
$$;

comment on function api.read_position(bytea, text, text) is
'The merchant of a key, and the restore generation and snapshot after which a reader of events continues who has read up
to p_next, the cursor of a last page of api.list_events. No row: the key may not read.';
