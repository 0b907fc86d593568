-- A merchant's events.
--
-- A cursor is the base64 of: restore generation, snapshot seen, snapshot goal or -, last xid, last id or -.
-- A snapshot in it is XMIN:XMAX-XMIN:DIFFERENCES, each open transaction as the difference to the one before it. Its
-- length is bounded, so that every cursor fits into a request.

create or replace function api.encode_snapshot(p_snapshot pg_snapshot) returns text
language sql stable
begin atomic
    select
        concat(
            low.xmin, ':', pg_snapshot_xmax(p_snapshot)::text::bigint - low.xmin, ':',
            (
                select string_agg((apart.xid - apart.previous)::text, ',' order by apart.xid)
                from (
                    select
                        open.xid::text::bigint as xid,
                        lag(open.xid::text::bigint, 1, low.xmin) over (order by open.xid) as previous
                    from pg_snapshot_xip(p_snapshot) as open (xid)
                ) as apart
            )
        )
    from (select pg_snapshot_xmin(p_snapshot)::text::bigint as xmin) as low;
end;

comment on function api.encode_snapshot(pg_snapshot) is 'A snapshot as it stands in a cursor.';

create or replace function api.decode_snapshot(p_text text) returns pg_snapshot
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
    v_parts text [] := string_to_array(p_text, ':');
    v_min bigint := v_parts[1]::bigint;
    v_open text;
begin
    if cardinality(v_parts) <> 3 or v_min < 1 then
        raise exception 'not a snapshot' using errcode = 'invalid_text_representation';
    end if;
    select string_agg(open.xid::text, ',' order by open.n) into v_open
    from (
        select (v_min + sum(apart.xids::bigint) over (order by apart.n))::bigint as xid, apart.n
        from string_to_table(nullif(v_parts[3], ''), ',') with ordinality as apart (xids, n)
    ) as open;
    return format('%s:%s:%s', v_min, v_min + v_parts[2]::bigint, v_open)::pg_snapshot;
end;
$$;

comment on function api.decode_snapshot(text) is
'The snapshot of a cursor. Raises an error of class 22 for any other text.';

create or replace function api.bound_snapshot(p_snapshot pg_snapshot, p_length_max integer) returns pg_snapshot
language sql stable
begin atomic
    select
        case
            when length(p_snapshot::text) <= p_length_max then p_snapshot
            else (
                select
                    concat(
                        pg_snapshot_xmin(p_snapshot), ':',
                        coalesce(min(kept.xid) filter (where kept.length > p_length_max), pg_snapshot_xmax(p_snapshot)),
                        ':',
                        string_agg(kept.xid::text, ',' order by kept.xid) filter (where kept.length <= p_length_max)
                    )::pg_snapshot
                from (
                    select
                        apart.xid,
                        -- Two numbers of 19 digits come before the list; each difference has a comma.
                        40 + sum(length((apart.xid::text::bigint - apart.previous)::text) + 1)
                            over (order by apart.xid) as length
                    from (
                        select
                            open.xid,
                            lag(open.xid::text::bigint, 1, pg_snapshot_xmin(p_snapshot)::text::bigint)
                                over (order by open.xid) as previous
                        from pg_snapshot_xip(p_snapshot) as open (xid)
                    ) as apart
                ) as kept
            )
        end;
end;

comment on function api.bound_snapshot(pg_snapshot, integer) is
'A snapshot whose text in a cursor has at most p_length_max characters. With more open transactions than fit, it ends
before the first that does not: later transactions are visible to the next reading.';

create or replace function api.list_events(p_key_hash bytea, p_after text, p_limit integer, p_address text default '')
returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_merchant text;
    v_seen pg_snapshot := '1:1:';
    v_goal pg_snapshot;
    -- Two snapshots of 1400 characters, base64, are less than the limit of the parameter after.
    v_now_seen pg_snapshot := api.bound_snapshot(pg_current_snapshot(), 1400);
    v_all constant pg_snapshot := '9223372036854775807:9223372036854775807:';
    v_last_generation integer := outbox.current_restore_generation();
    v_generation integer := 1;
    v_at_xid xid8 := '0';
    v_at_id text := '';
    v_parts text [];
    v_data json;
    v_count bigint;
    v_last_xid xid8;
    v_last_id text;
    v_next text;
begin
    select k.merchant_id into v_merchant from api.identify_merchant(p_key_hash, 'read', p_address) as k;
    if not found then
        return;
    end if;
    if p_after is not null then
        begin
            v_parts := string_to_array(convert_from(decode(translate(p_after, '-_', '+/'), 'base64'), 'UTF8'), ' ');
            if cardinality(v_parts) <> 5 then
                raise exception 'parts' using errcode = 'invalid_text_representation';
            end if;
            v_generation := v_parts[1]::integer;
            v_seen := api.decode_snapshot(v_parts[2]);
            v_goal := case when v_parts[3] <> '-' then api.decode_snapshot(v_parts[3]) end;
            v_at_xid := v_parts[4]::bigint::text::xid8;
            v_at_id := nullif(v_parts[5], '-');
            if v_generation not between 1 and v_last_generation or v_parts[4]::bigint < 0
                or v_at_id !~ '^evt_[0-9a-f]{24}$' then
                raise exception 'range' using errcode = 'invalid_text_representation';
            end if;
        exception
            when data_exception then
                raise exception 'after is not a cursor of this API' using errcode = 'SU006';
        end;
        v_at_id := coalesce(v_at_id, '');
    end if;
    -- A restore generation that has ended gets no more events: all of them are visible.
    v_goal := coalesce(v_goal, case when v_generation < v_last_generation then v_all else v_now_seen end);
    with page as (
        select w.xid, w.id, w.type, e.payload, e.aggregate_id
        from outbox.walk_events(
            false, v_merchant, v_generation, v_seen, v_goal, v_at_xid, v_at_id, p_limit) as w
        join outbox.events as e on e.id = w.id
    )
    select
        coalesce(json_agg(json_build_object(
            'id', g.id, 'type', g.type, 'created_at', g.payload ->> 'at',
            'data', coalesce(shown.document, refund.document, dispute.document)
        ) order by g.xid, g.id) filter (where coalesce(p.id, r.id, d.id) is not null), '[]'::json),
        count(*), max(g.xid), (array_agg(g.id order by g.xid desc, g.id desc))[1]
    into v_data, v_count, v_last_xid, v_last_id
    from page as g
    left join surety.payments as p on p.id = g.aggregate_id
    left join surety.refunds as r on r.id = g.aggregate_id
    left join surety.disputes as d on d.id = g.aggregate_id
    -- offset 0: each object is built once, not once per field of its document.
    left join lateral (
        select api.payment_at_event(p, g.payload) as payment where p.id is not null offset 0
    ) as past_payment on true
    left join lateral (
        select api.refund_at_event(r, g.payload) as refund where r.id is not null offset 0
    ) as past_refund on true
    left join lateral (
        select api.dispute_at_event(d, g.payload) as dispute where d.id is not null offset 0
    ) as past_dispute on true
    left join lateral api.show_payment(past_payment.payment) as shown on p.id is not null
    left join lateral api.show_refund(past_refund.refund) as refund on r.id is not null
    left join lateral api.show_dispute(past_dispute.dispute) as dispute on d.id is not null;
    -- After a failover, transaction ids that the standby has not seen are assigned again. A cursor that counts them as
    -- seen would skip their events. This id is above all ids of the snapshot, and the answer waits until the standby
    -- has it.
    perform surety.await_standbys();
    v_next := case
        when v_count = p_limit then concat_ws(
            ' ', v_generation, api.encode_snapshot(v_seen), api.encode_snapshot(v_goal), v_last_xid, v_last_id)
        when v_goal::text = v_all::text then concat_ws(' ', v_generation + 1, '1:0:', '-', '0', '-')
        else concat_ws(' ', v_generation, api.encode_snapshot(v_goal), '-', '0', '-')
    end;
    return query select
        v_merchant,
        json_build_object(
            'object', 'list', 'data', v_data,
            'has_more', v_count = p_limit or v_generation < v_last_generation or v_goal::text <> v_now_seen::text,
            'next', translate(encode(convert_to(v_next, 'UTF8'), 'base64'), E'+/\n', '-_'))::text;
end;
$$;

comment on function api.list_events(bytea, text, integer, text) is
'A page of the merchant''s events, oldest first, by restore generation. p_after: the cursor next of the last page. It
holds two snapshots, as a handler''s position does, so that a reader misses no event, however late its transaction
commits. No row: the key may not read. Raises SU006 for a text that is no cursor.';
