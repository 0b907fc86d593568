-- Payments read: one, a list, the history of one.

create or replace function api.get_payment(p_key_hash bytea, p_id text, p_address text = '', p_scope text = 'read')
returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select shown.document::text
            from surety.payments cross join lateral api.show_payment(payments) as shown
            where payments.id = p_id and payments.merchant_id = who.merchant_id
        )
    from api.identify_merchant(p_key_hash, p_scope, p_address) as who;
end;

comment on function api.get_payment(bytea, text, text, text) is
'A payment of the merchant; body is null if it has none of that id. No row: the key may not be used for p_scope.';

create or replace function api.list_payments(
    p_key_hash bytea, p_state text, p_status text, p_reference text, p_created_from timestamptz,
    p_created_before timestamptz, p_limit integer, p_starting_after text, p_labels jsonb default '{}',
    p_address text default ''
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
set enable_sort = off set enable_incremental_sort = off
as $$
-- The merchant and both bounds are found before payments are read. So the cost of a page does not depend on other
-- merchants or on its age.
declare
    v_merchant text := (select k.merchant_id from api.identify_merchant(p_key_hash, 'read', p_address) as k);
    v_from text := surety.id_at('pay', greatest(p_created_from, 'epoch'));
    v_before text := case
        when p_created_before is null then 'pay_g' else surety.id_at('pay', greatest(p_created_before, 'epoch'))
    end;
    v_states text [];
    -- A state whose status depends on the rail.
    v_rails text [] := case p_status when 'returned' then '{ach}' when 'lost' then '{card}' end;
    v_labels jsonb := p_labels || case
        when p_labels ? 'customer.email'
            then jsonb_build_object('customer.email', surety.fold_email(p_labels ->> 'customer.email'))
        else '{}'
    end;
    v_name text;
    v_value text;
    v_ids text [];
begin
    if v_merchant is null then
        return;
    end if;
    if p_starting_after is not null and not exists (
        select from surety.payments as c where c.id = p_starting_after and c.merchant_id = v_merchant
    ) then
        perform api.refuse_cursor();
    end if;
    if p_state is not null or p_status is not null then
        v_states := array(
            select s.state from surety.states as s
            where (p_state is null or s.state = p_state)
                and (p_status is null or p_status in (
                    surety.payment_status(s.status, 'card'), surety.payment_status(s.status, 'ach')))
        );
    end if;
    v_before := least(v_before collate "C", p_starting_after collate "C");
    if v_labels <> '{}' then
        -- Through the payments with one of the labels. The others are looked up.
        select l.key, l.value into v_name, v_value from jsonb_each_text(v_labels) as l order by l.key limit 1;
        v_ids := array(
            select p.id
            from surety.payment_labels as l
            join surety.payments as p on p.id = l.payment_id
            where l.merchant_id = v_merchant and l.name = v_name and l.value = v_value
                and l.payment_id >= v_from and l.payment_id < v_before
                and (p_reference is null or p.reference = p_reference)
                and (v_states is null or p.state = any(v_states)) and (v_rails is null or p.rail = any(v_rails))
                and not exists (
                    select from jsonb_each_text(v_labels) as other
                    where not exists (
                        select from surety.payment_labels as found
                        where found.merchant_id = v_merchant and found.name = other.key and found.value = other.value
                            and found.payment_id = l.payment_id
                    )
                )
            order by l.payment_id desc
            limit p_limit + 1
        );
    elsif p_reference is null and v_states is null then
        v_ids := array(
            select p.id from surety.payments as p
            where p.merchant_id = v_merchant and p.id >= v_from and p.id < v_before
            order by p.id desc
            limit p_limit + 1
        );
    elsif p_reference is null then
        -- The newest of each state: a state without payments costs nothing. Only the index of states can serve the row
        -- comparisons and the order; with equalities the planner may walk through all payments of the merchant.
        v_ids := array(
            select newest.id
            from unnest(v_states) as s (state)
            cross join lateral (
                select p.id from surety.payments as p
                where (p.merchant_id, p.state, p.id) >= (v_merchant, s.state, v_from)
                    and (p.merchant_id, p.state, p.id) < (v_merchant, s.state, v_before)
                    and p.id >= v_from and p.id < v_before
                    and (v_rails is null or p.rail = any(v_rails))
                order by p.merchant_id desc, p.state desc, p.id desc
                limit p_limit + 1
            ) as newest
            order by newest.id desc
            limit p_limit + 1
        );
    else
        v_ids := array(
            select p.id from surety.payments as p
            where p.merchant_id = v_merchant and p.reference = p_reference and p.id >= v_from and p.id < v_before
                and (v_states is null or p.state = any(v_states)) and (v_rails is null or p.rail = any(v_rails))
            order by p.id desc
            limit p_limit + 1
        );
    end if;
    return query
    select v_merchant, api.render_page(
        array(
            select shown.document
            from surety.payments as p cross join lateral api.show_payment(p) as shown
            where p.id = any(v_ids)
            order by p.id desc
        ),
        p_limit);
end;
$$;

comment on function api.list_payments(bytea, text, text, text, timestamptz, timestamptz, integer, text, jsonb, text) is
'A page of the merchant''s payments, newest first, by state, status, reference, time of creation (from, before) and
labels, {name: value} as by surety.labels_of_payment. Ids sort by time, so p_starting_after is the last id of the page
before. No row: the key may not read.';

create or replace function api.summarize_trace_entry(p_kind text, p_summary text, p_outcome text, p_data jsonb)
returns text
language sql stable parallel safe
begin atomic
    -- An error's text and an operator's reason are written for operators, so merchants never see them.
    select case
        when p_kind in ('request', 'step', 'refund', 'dispute', 'webhook', 'poll', 'file', 'transfer') then p_summary
        when p_kind = 'call' and p_summary like '←%'
            then '← ' || split_part(p_data ->> 'operation', ':', 1) || ' ' || p_outcome
        when p_kind = 'call' then '→ ' || split_part(p_data ->> 'operation', ':', 1)
        when p_kind = 'retry' then split_part(p_summary, ':', 1)
        else concat_ws(' ', p_kind, p_outcome)
    end;
end;

comment on function api.summarize_trace_entry(text, text, text, jsonb) is
'The summary of an entry of a trace for its merchant: without errors'' texts and operators'' reasons.';

create or replace function api.select_trace_data(p_kind text, p_actor text, p_data jsonb) returns jsonb
language sql stable parallel safe
begin atomic
    select case
        when p_kind not in ('call', 'retry', 'operator') and p_actor like 'key:%' then p_data
        when p_kind in ('step', 'refund', 'dispute', 'webhook', 'poll', 'file', 'transfer')
            then p_data - 'address' - 'request_id'
        when p_kind in ('call', 'retry')
            then jsonb_strip_nulls(jsonb_build_object(
                'operation', p_data -> 'operation', 'key', p_data -> 'key', 'status', p_data -> 'status',
                'sends', p_data -> 'sends', 'failures', p_data -> 'failures'
            ))
        else '{}'
    end;
end;

comment on function api.select_trace_data(text, text, jsonb) is
'The data of an entry of a trace for its merchant: of calls and retries only the named fields, of operators'' entries
none, and no address or request but the merchant''s own.';

create or replace function api.get_trace(p_key_hash bytea, p_id text, p_address text default '')
returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select json_build_object(
                'payment', shown.document,
                'entries', (
                    select coalesce(json_agg(json_build_object(
                        'at', surety.format_time(entry.at),
                        'kind', entry.kind,
                        'actor', json_build_object(
                            'type', split_part(entry.actor, ':', 1),
                            -- Names of workers and operators are not for merchants.
                            'id', case when entry.actor like 'key:%' then split_part(entry.actor, ':', 2) end
                        ),
                        'summary',
                        api.summarize_trace_entry(entry.kind, entry.summary, entry.outcome, entry.data),
                        'from', entry.from_state,
                        'to', entry.to_state,
                        'outcome', entry.outcome,
                        'duration_ms', entry.duration_ms,
                        'data', api.select_trace_data(entry.kind, entry.actor, entry.data)
                    ) order by entry.place), '[]'::json)
                    from surety.trace_payment(p_id) with ordinality as entry (
                        at, kind, actor, summary, from_state, to_state, outcome, duration_ms, data, place
                    )
                    -- The platform's payouts and its bank are not the merchant's.
                    where entry.kind not in ('payout', 'bank')
                )
            )::text
            from surety.payments cross join lateral api.show_payment(payments) as shown
            where payments.id = p_id and payments.merchant_id = who.merchant_id
        )
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;

comment on function api.get_trace(bytea, text, text) is
'The history of a payment as its merchant may read it, oldest first; body is null if the merchant has none of that id.
No row: the key may not read.';
