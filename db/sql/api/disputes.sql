-- Disputes: submit evidence, read, list.

create or replace function api.submit_evidence(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_admitted api.admission := api.admit_command('POST /v1/disputes/{id}/evidence', 'disputes:write', p_request);
    v_dispute surety.disputes;
    v_takes_evidence boolean;
    v_characters_max constant integer := 150000;
    v_characters integer;
begin
    if not v_admitted.outcome is null then
        return v_admitted.outcome;
    end if;
    select d.* into v_dispute from surety.disputes as d
    where d.id = p_request ->> 'dispute_id' and d.merchant_id = v_admitted.merchant_id
    for update;
    if not found then
        return api.refuse_command(v_admitted, 'not-found', null);
    end if;
    v_takes_evidence := exists (
        select from surety.dispute_statuses as s where s.status = v_dispute.status and s.takes_evidence
    );
    if not v_takes_evidence or v_dispute.submit_asked_at is not null
        or v_dispute.evidence_due_at < v_admitted.admitted_at then
        return api.refuse_command(v_admitted, 'wrong-state', jsonb_build_object(
            'state', v_dispute.status,
            'reason', case
                when v_dispute.submit_asked_at is not null then 'its evidence was submitted'
                when v_takes_evidence then 'its evidence was due by ' || surety.format_time(v_dispute.evidence_due_at)
            end));
    end if;
    v_characters := (
        select sum(length(given.value)) from jsonb_each_text(v_dispute.evidence || (p_request -> 'evidence')) as given
    );
    if v_characters > v_characters_max then
        return api.refuse_command(v_admitted, 'invalid-request', jsonb_build_object(
            'field', '/evidence', 'rule', 'max_length', 'limit', v_characters_max, 'given', v_characters));
    end if;
    update surety.disputes as d
    set version = d.version + 1, evidence = d.evidence || (p_request -> 'evidence'),
        evidence_revision = d.evidence_revision + 1, evidence_failure = null,
        submit_asked_at = case when (p_request ->> 'submit')::boolean then v_admitted.admitted_at end,
        updated_at = v_admitted.admitted_at
    where d.id = v_dispute.id
    returning * into v_dispute;
    perform surety.emit_dispute_event(v_dispute, 'dispute.evidence_given', v_admitted.admitted_at);
    return api.complete_command(
        v_admitted, p_request, v_dispute.payment_id, 202,
        (select shown.document::text from api.show_dispute(v_dispute) as shown),
        jsonb_build_object('dispute', v_dispute.id, 'submit', (p_request ->> 'submit')::boolean));
end;
$$;

comment on function api.submit_evidence(jsonb) is
'Adds evidence to a dispute; p_request as for api.admit_command, with dispute_id, evidence {field: text} and submit.
A field given before is kept unless it is given again. With submit, the evidence goes to the network, once. 202 and the
dispute. Problems: not-found; wrong-state, detail {state, reason}: submitted, closed, or past its deadline;
invalid-request, detail {field, rule, limit, given}: all evidence together is too long for the provider.';

create or replace function api.get_dispute(p_key_hash bytea, p_id text, p_address text default '')
returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select shown.document::text
            from surety.disputes cross join lateral api.show_dispute(disputes, true) as shown
            where disputes.id = p_id and disputes.merchant_id = who.merchant_id
        )
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;

comment on function api.get_dispute(bytea, text, text) is
'A dispute of the merchant; body is null if the merchant has none of that id. No row: the key may not read.';

create or replace function api.list_disputes(
    p_key_hash bytea, p_payment text, p_limit integer, p_starting_after text, p_address text default ''
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_merchant text := (select k.merchant_id from api.identify_merchant(p_key_hash, 'read', p_address) as k);
    v_ids text [];
begin
    if v_merchant is null then
        return;
    end if;
    if p_starting_after is not null and not exists (
        select from surety.disputes as c where c.id = p_starting_after and c.merchant_id = v_merchant
    ) then
        perform api.refuse_cursor();
    end if;
    if p_payment is null then
        v_ids := array(
            select d.id from surety.disputes as d
            where d.merchant_id = v_merchant and d.id < coalesce(p_starting_after, 'dp_g')
            order by d.id desc
            limit p_limit + 1
        );
    else
        v_ids := array(
            select d.id from surety.disputes as d
            where d.payment_id = p_payment and d.merchant_id = v_merchant and d.id < coalesce(p_starting_after, 'dp_g')
            order by d.id desc
            limit p_limit + 1
        );
    end if;
    return query
    select v_merchant, api.render_page(
        array(
            select shown.document
            from surety.disputes as d cross join lateral api.show_dispute(d) as shown
            where d.id = any(v_ids)
            order by d.id desc
        ),
        p_limit);
end;
$$;

comment on function api.list_disputes(bytea, text, integer, text, text) is
'A page of the merchant''s disputes, newest first. p_payment: of one payment only; p_starting_after: the last id of the
page before. No row: the key may not read.';
