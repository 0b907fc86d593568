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

create or replace function api.show_events(p_ids text[]) returns table (id text, document json)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
begin
    return query
    select e.id, row_to_json(built.*)
    from unnest(p_ids) as asked (id)
    join outbox.events as e on e.id = asked.id
    left join surety.payments as p on p.id = e.aggregate_id
    left join surety.refunds as r on r.id = e.aggregate_id
    left join surety.disputes as d on d.id = e.aggregate_id
    left join surety.customers as c on c.id = e.aggregate_id
    left join surety.payment_methods as m on m.id = e.payload ->> 'payment_method' and m.customer_id = c.id
    -- offset 0: each object is built once, not once per field of its document.
    left join lateral (
        select api.payment_at_event(p, e.payload) as payment where p.id is not null offset 0
    ) as past_payment on true
    left join lateral (
        select api.refund_at_event(r, e.payload) as refund where r.id is not null offset 0
    ) as past_refund on true
    left join lateral (
        select api.dispute_at_event(d, e.payload) as dispute where d.id is not null offset 0
    ) as past_dispute on true
    left join lateral (
        select api.customer_at_event(c, e.payload) as customer where c.id is not null and m.id is null offset 0
    ) as past_customer on true
    left join lateral (
        select api.method_at_event(m, e.type, e.payload) as method where m.id is not null offset 0
    ) as past_method on true
    left join lateral api.show_payment(past_payment.payment) as shown on p.id is not null
    left join lateral api.show_refund(past_refund.refund) as refund on r.id is not null
    left join lateral api.show_dispute(past_dispute.dispute) as dispute on d.id is not null
    left join lateral api.show_customer(past_customer.customer) as customer on c.id is not null and m.id is null
    left join lateral api.show_payment_method(past_method.method) as method on m.id is not null
    cross join lateral (
        select
            e.id as id, 'event' as object, e.type as type, e.payload ->> 'at' as created_at,
            coalesce(
                shown.document, refund.document, dispute.document, customer.document, method.document,
                -- A payout to a merchant is in its event as it was then.
                (e.payload -> 'merchant_payout')::json) as data
    ) as built
    where built.data is not null;
end;
$$;

comment on function api.show_events(text[]) is
'Events as documents of the API, each with its payment, refund, dispute, customer, saved payment method or payout
to the merchant at that version; none without one. A customer''s fields, except its version, are as they are.';

create or replace function api.get_event(p_key_hash bytea, p_id text, p_address text default '')
returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select shown.document::text
            from outbox.events cross join lateral api.show_events(array[events.id]) as shown
            where events.id = p_id and events.merchant_id = who.merchant_id
        )
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;

comment on function api.get_event(bytea, text, text) is
'An event of the merchant; body is null if the merchant has none of that id. No row: the key may not read.';

create or replace function api.list_events(
    p_key_hash bytea, p_starting_after text, p_limit integer, p_type text default null, p_object text default null,
    p_address text default ''
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_merchant text;
    v_seen pg_snapshot := '1:1:';
    v_goal pg_snapshot;
    -- Two snapshots of 1400 characters, base64, are less than the limit of the parameter starting_after.
    v_now_seen pg_snapshot := api.bound_snapshot(pg_current_snapshot(), 1400);
    v_all constant pg_snapshot := '9223372036854775807:9223372036854775807:';
    v_last_generation integer := outbox.current_restore_generation();
    v_generation integer := 1;
    v_at_xid xid8 := '0';
    v_at_id text := '';
    v_parts text [];
    v_ids text [];
    v_data json;
    v_has_more boolean;
    -- A page with a filter walks over more events than it shows, and may be empty although there are more.
    v_walked_max integer := case when p_type is null and p_object is null then p_limit else 2000 end;
    v_family text := case when p_type like '%.*' then rtrim(p_type, '*') || '%' end;
    v_last_xid xid8;
    v_last_id text;
    v_next text;
begin
    select k.merchant_id into v_merchant from api.identify_merchant(p_key_hash, 'read', p_address) as k;
    if not found then
        return;
    end if;
    if p_starting_after is not null then
        begin
            -- Decoding would pass over white space.
            if p_starting_after !~ '^[0-9A-Za-z_=-]+$' then
                raise exception 'alphabet' using errcode = 'invalid_text_representation';
            end if;
            v_parts := string_to_array(
                convert_from(decode(translate(p_starting_after, '-_', '+/'), 'base64'), 'UTF8'), ' ');
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
                perform api.refuse_cursor();
        end;
        v_at_id := coalesce(v_at_id, '');
    end if;
    -- A restore generation that has ended gets no more events: all of them are visible.
    v_goal := coalesce(v_goal, case when v_generation < v_last_generation then v_all else v_now_seen end);
    with walked as materialized (
        select w.xid, w.id, w.type
        from outbox.walk_events(
            false, v_merchant, v_generation, v_seen, v_goal, v_at_xid, v_at_id, v_walked_max) as w
    ),
    page as materialized (
        select w.xid, w.id
        from walked as w
        where (p_type is null or w.type = p_type or w.type like v_family)
            and (p_object is null or exists (
                select from outbox.events as e where e.id = w.id and e.aggregate_id = p_object))
        order by w.xid, w.id
        limit p_limit
    ),
    -- The last event that need not be read again: that of a full page, else of all that were walked.
    reached as (
        select r.xid, r.id from (
            select g.xid, g.id from page as g where p_limit = (select count(*) from page)
            union all
            select w.xid, w.id from walked as w where p_limit > (select count(*) from page)
        ) as r
        order by r.xid desc, r.id desc
        limit 1
    )
    select
        array(select g.id from page as g order by g.xid, g.id),
        p_limit = (select count(*) from page) or v_walked_max = (select count(*) from walked), r.xid, r.id
    into v_ids, v_has_more, v_last_xid, v_last_id
    from (values (1)) as once (n) left join reached as r on true;
    v_data := coalesce(
        (
            select json_agg(shown.document order by array_position(v_ids, shown.id))
            from api.show_events(v_ids) as shown
        ), '[]'::json);
    -- After a failover, transaction ids that the standby has not seen are assigned again. A cursor that counts them as
    -- seen would skip their events. This id is above all ids of the snapshot, and the answer waits until the standby
    -- has it.
    perform surety.await_standbys();
    v_next := case
        when v_has_more then concat_ws(
            ' ', v_generation, api.encode_snapshot(v_seen), api.encode_snapshot(v_goal), v_last_xid, v_last_id)
        when v_goal::text = v_all::text then concat_ws(' ', v_generation + 1, '1:0:', '-', '0', '-')
        else concat_ws(' ', v_generation, api.encode_snapshot(v_goal), '-', '0', '-')
    end;
    return query select
        v_merchant,
        json_build_object(
            'object', 'list', 'data', v_data,
            'has_more', v_has_more or v_generation < v_last_generation or v_goal::text <> v_now_seen::text,
            'next', translate(encode(convert_to(v_next, 'UTF8'), 'base64'), E'+/\n', '-_'))::text;
end;
$$;

comment on function api.list_events(bytea, text, integer, text, text, text) is
'A page of the merchant''s events, oldest first, by restore generation. p_type: one type, or a family such as refund.*;
p_object: the id of the payment, refund, dispute or customer. p_starting_after: the cursor next of the last page. It
holds two snapshots, as a handler''s position does, so that a reader misses no event, however late its transaction
commits. No row: the key may not read. Raises SU006 for a text that is no cursor.';
