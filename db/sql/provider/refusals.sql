-- Refusals by the provider: payments and refunds fail, a capture gets a fact of its own, evidence is open again.
-- Payments whose account it refuses end after a day.

create or replace function surety.record_refused_captures(p_results jsonb, p_actor text) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_refused surety.facts [];
begin
    select array_agg(surety.new_fact(
        p_id => surety.new_id('fct', v_now), p_payment_id => p.id, p_provider => p.provider,
        p_account => p.provider_account, p_livemode => p.livemode, p_object_id => p.id || ':capture',
        p_kind => 'capture_refused', p_revision => asked.revision, p_amount_minor => asked.amount_minor,
        p_currency => p.currency, p_data => jsonb_build_object('failure', r.refused), p_source => 'response',
        p_recorded_at => v_now
    ) order by p.id) into v_refused
    from jsonb_to_recordset(p_results) as r (payment_id text, operation text, refused jsonb)
    join surety.payments as p on p.id = r.payment_id
    cross join lateral surety.pending_capture(p.id) as asked
    where r.refused is not null and r.operation = 'capture';
    if v_refused is null then
        return '{}';
    end if;
    perform surety.store_command_fact(f) from unnest(v_refused) as f;
    return surety.advance_payments(
        array(select d from surety.derive_payments(array(select f.payment_id from unnest(v_refused) as f)) as d),
        'response', p_actor, null);
end;
$$;

comment on function surety.record_refused_captures(jsonb, text) is
'Records refused captures as facts. The authorization stays, so another capture may be requested. The payments are
locked by the caller. Returns the types of the events made.';

create or replace function surety.fail_refused_refunds(p_results jsonb, p_actor text) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_refused surety.refunds [];
    v_types text [];
begin
    with refused as (
        update surety.refunds as r
        set failure = result.refused
        from jsonb_to_recordset(p_results) as result (refund_id text, refused jsonb)
        where r.id = result.refund_id and result.refused is not null and r.state = 'pending' and r.provider_id is null
        returning r
    )
    select array_agg(f.r order by (f.r).payment_id, (f.r).id) into v_refused from refused as f;
    if v_refused is null then
        return '{}';
    end if;
    insert into surety.refund_steps (refund_id, version, from_state, to_state, cause, at, actor)
    select r.id, r.version + 1, r.state, 'failed', 'refused', v_now, p_actor from unnest(v_refused) as r;
    v_types := surety.advance_payments(
        array(
            select d from surety.derive_payments(array(select distinct r.payment_id from unnest(v_refused) as r)) as d
        ), 'response', p_actor, null);
    perform ledger.post(array_agg(ledger.entry(
        p_cause => r.id || ':failed', p_rule => 'refund_failed', p_payment_id => r.payment_id,
        p_merchant_id => r.merchant_id, p_provider_owner => r.provider || '/' || r.provider_account,
        p_currency => r.currency, p_gross => r.amount_minor)), v_now)
    from unnest(v_refused) as r;
    return v_types || 'refund.failed'::text;
end;
$$;

comment on function surety.fail_refused_refunds(jsonb, text) is
'Ends refused refunds as failed and releases what they reserved. The payments are locked by the caller. Returns the
types of the events made.';

create or replace function surety.reopen_evidence(p_dispute_id text, p_revision integer, p_failure jsonb) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_reopened surety.disputes;
begin
    update surety.disputes as d
    set version = d.version + 1, submit_asked_at = null, evidence_failure = p_failure, updated_at = v_now
    from surety.dispute_statuses as s
    where d.id = p_dispute_id and d.evidence_revision = p_revision
        -- A dispute that takes no evidence any more has it, or has ended.
        and s.status = d.status and s.takes_evidence
    returning d.* into v_reopened;
    if not found then
        return '{}';
    end if;
    perform surety.emit_dispute_event(v_reopened, 'dispute.evidence_refused', v_now);
    return array['dispute.evidence_refused'];
end;
$$;

comment on function surety.reopen_evidence(text, integer, jsonb) is
'Opens a dispute''s evidence again after its last revision was not taken, with the failure that its merchant reads:
{code, message}. Nothing changes if more was given since. Returns the types of the events made.';

create or replace function surety.reopen_refused_evidence(p_results jsonb) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_refused record;
    v_types text [] := '{}';
begin
    for v_refused in
        select
            split_part(r.operation, ':', 2) as dispute_id, split_part(r.operation, ':', 3)::integer as revision,
            r.refused
        from jsonb_to_recordset(p_results) as r (operation text, refused jsonb)
        where r.refused is not null and r.operation like 'evidence:%'
        order by r.operation
    loop
        v_types := v_types
            || surety.reopen_evidence(v_refused.dispute_id, v_refused.revision, v_refused.refused - 'decline_code');
    end loop;
    return v_types;
end;
$$;

comment on function surety.reopen_refused_evidence(jsonb) is
'Opens refused evidence again. The payments are locked by the caller. Returns the types of the events made.';

create or replace function surety.record_refused_calls(p_results jsonb, p_actor text) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_types text[] := '{}';
begin
    perform from surety.payments as p
    where p.id in (
        select r.result ->> 'payment_id' from jsonb_array_elements(p_results) as r (result) where r.result ? 'refused'
    )
    order by p.id for update;
    update surety.payments as p
    set failure = r.refused
    from jsonb_to_recordset(p_results) as r (payment_id text, refused jsonb)
    where p.id = r.payment_id and r.refused is not null and p.state = 'submitting';
    v_types := surety.record_refused_captures(p_results, p_actor) || surety.fail_refused_refunds(p_results, p_actor)
        || surety.reopen_refused_evidence(p_results);
    with refused as (
        insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)
        select p.id, p.version + 1, p.state, 'failed', 'refused', v_now, p_actor
        from jsonb_to_recordset(p_results) as r (payment_id text, refused jsonb)
        join surety.payments as p on p.id = r.payment_id
        where r.refused is not null and p.state = 'submitting'
        order by p.id
        returning to_state
    )
    select v_types || coalesce(array_agg(distinct 'payment.' || s.to_state), '{}') into v_types from refused as s;
    return v_types;
end;
$$;

comment on function surety.record_refused_calls(jsonb, text) is
'Records the refusals among results (as surety.record_call_results takes them): refunds, and payments whose creation
was refused, fail; a capture''s refusal becomes a fact; evidence is open again. Locks their payments. Returns the types
of the events made.';

create or replace function surety.end_refused_payments(p_actor text, p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_since timestamptz := v_now - surety.refused_payment_lifetime();
    v_ids text[];
    v_types text[];
begin
    select array_agg(ended.id) into v_ids
    from (
        select waiting.id
        from (
            -- A payment in submitting has poll_at, so that the index on it finds those whose merchant canceled them.
            select p.id
            from surety.payments as p
            where p.poll_at is not null and p.state = 'submitting' and p.flags ? 'cancel_requested_at'
            union
            select p.id
            from surety.circuit_breakers as b
            join surety.merchants as m on m.provider_account = b.account
            join surety.payments as p
                on p.merchant_id = m.id and p.state in ('initiated', 'submitting')
                and p.id < surety.id_at('pay', v_since)
            where b.cause = 'account_refused' and b.opened_at < v_since
        ) as waiting
        where surety.is_surely_unexecuted(waiting.id)
        order by waiting.id
        limit p_limit
    ) as ended;
    if v_ids is null then
        return '{}';
    end if;
    -- Again behind the lock: a worker may have sent one since.
    perform from surety.payments as p where p.id = any(v_ids) order by p.id for update;
    v_ids := array(
        select p.id from surety.payments as p
        where p.id = any(v_ids) and p.state in ('initiated', 'submitting') and surety.is_surely_unexecuted(p.id)
    );
    update surety.payments as p
    set failure = jsonb_build_object(
        'code', 'provider_account_refused',
        'message', 'The provider does not accept payments for this account. Nothing was charged.')
    where p.id = any(v_ids) and not p.flags ? 'cancel_requested_at';
    perform audit.write_entry(
        'system', p_actor, 'payment ended', 'the provider refuses its account: ' || b.reason,
        p_payment_id => p.id, p_merchant_id => p.merchant_id,
        p_snapshot => jsonb_build_object('account', b.account, 'refused_since', surety.format_time(b.opened_at)))
    from surety.payments as p
    join surety.circuit_breakers as b
        on b.provider = p.provider and b.account = p.provider_account and b.cause = 'account_refused'
    where p.id = any(v_ids) and not p.flags ? 'cancel_requested_at';
    with ended as (
        insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)
        select
            p.id, p.version + 1, p.state,
            case when p.flags ? 'cancel_requested_at' then 'canceled' else 'failed' end,
            case when p.flags ? 'cancel_requested_at' then 'command' else 'refused' end, v_now, p_actor
        from surety.payments as p where p.id = any(v_ids)
        order by p.id
        returning to_state
    )
    select coalesce(array_agg(distinct 'payment.' || e.to_state), '{}') into v_types from ended as e;
    return v_types;
end;
$$;

comment on function surety.end_refused_payments(text, integer) is
'Ends payments that the provider has surely not executed: canceled, if their merchant has asked for that; failed, if the
provider has refused their account for longer than surety.refused_payment_lifetime() and they have waited as long. At
most p_limit payments. The provider''s words are in the audit trail. Returns the types of the events made.';
